"""Everything that a conversion will do, decided and checked before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ..models.derived.check import check_once
from ..models.hf.config import SparseConfigMixin
from ..models.hf.hearing import hearing_warnings, is_causal
from ..models.hf.indexer import UNTRAINED, Indexer
from ..models.hf.layer_spec import LayersLike
from ..models.hf.model_mixin import SparseMixin
from ..models.hf.register import Family, family_of
from ..pattern.like import PatternLike
from .carry import read_json
from .check import check_fits, meta_model, sparse_config
from .generation import CacheChoice, choose_cache
from .indexers import find_indexers, split_indexers
from .positions import changes, check_choice, check_growth, scale_rope, set_length
from .processors import TokenizerClass, TokenLimit, tokenizer_class
from .source import Source
from .token_ids import token_ids
from .weights import Work

REPORT = "conversion.json"


@dataclass(frozen=True)
class Choice:
    """What the user asked for, see `convert`."""

    pattern: PatternLike | None = None
    layers: LayersLike = None
    max_length: int | None = None
    positions: str = "tile"
    rope: str | None = None
    global_token_ids: tuple[int | str, ...] = ()
    cache: str | None = None
    decode: str | None = None
    indexer: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Prepared:
    """A conversion that passed every check: the new configuration and what happens to each tensor.

    Attributes:
        carried: the files that travel with the weights.
        tokenizer: the class that reads the tokenizer, where there is one.
        limit: the most tokens that the tokenizer shall give, where the model or the user sets one.
        lengths: tokens that the model takes before and after, where anything limits them.
        cache: what `generate` decodes with; None for a model that does not generate.
        warnings: what the user should know before the result is used, one sentence each.
        indexers: those that the source has no weights of, by name.
    """

    source: Source
    choice: Choice
    family: Family
    config: SparseConfigMixin
    work: Work
    carried: tuple[Path, ...]
    tokenizer: TokenizerClass | None
    limit: TokenLimit | None
    lengths: tuple[int | None, int | None]
    is_causal: bool
    cache: CacheChoice | None
    warnings: tuple[str, ...]
    indexers: dict[str, Indexer]


def prepare(source: Source, choice: Choice) -> Prepared:
    """Decide everything.

    Raises:
        ValueError: an unsupported family, a bad choice, or weights that do not fit the configuration.
    """
    check_choice(choice.positions, choice.rope, choice.max_length)
    source, warnings = _without_weights_of_attention(source)
    family = family_of(source.config["model_type"])
    if source.config.get("sparse_attention") is not None:
        # it will be replaced, but one that does not fit says that something else is wrong
        sparse_config(family, source.config)
    model = meta_model(family, source.config)
    if not family.verified:
        check_once(type(model), model.config)
    marked = token_ids(choice.global_token_ids, source)
    config = family.config_class.from_dense(
        source.config, choice.pattern, choice.layers, marked, choice.decode, choice.indexer
    )
    # a family may have them in several ways, of which a configuration chooses one
    family = dataclasses.replace(family, positions=config.positions)
    if not family.verified:
        check_growth(family.positions, model, choice.max_length)
    config.architectures = _architectures(source.config, family, model)
    computed = family.positions.tables if family.positions.scheme == "sinusoidal" else ()
    # quantised weights are stored packed, under shapes of their own
    if source.shards and not source.config.get("quantization_config"):
        check_fits(source.tensors, model, computed, source.folder)
    lengths = set_length(config, family.positions, choice.max_length)
    scale_rope(config, family, choice.rope, *lengths)
    grown = changes(source.tensors, family.positions, *lengths, choice.positions)
    carried, causal = tuple(source.carried), is_causal(model)
    new, others = split_indexers(source.tensors, find_indexers(family, config), config)
    return Prepared(
        source=source,
        choice=choice,
        family=family,
        config=config,
        work=Work(source.shards, grown, _left_out(source) | others),
        carried=carried,
        tokenizer=tokenizer_class(source.folder, source.name, carried),
        limit=_limit(choice, family, lengths[1]),
        lengths=lengths,
        is_causal=causal,
        cache=choose_cache(config, model, choice.cache),
        warnings=(
            *warnings,
            *mark_warnings(config, family, config.architectures),
            *hearing_warnings(config, causal, lengths[1]),
            *_length_warnings(*lengths),
            *([UNTRAINED] if new else []),
        ),
        indexers=new,
    )


def checkpoint_warnings(
    folder: Path, config: SparseConfigMixin, is_causal: bool, length: int | None = None
) -> list[str]:
    """What `convert` says of a checkpoint, said of one that is there, which reads `length` tokens or all that it takes."""
    family, positions, report = family_of(config.model_type), config.positions, folder / REPORT
    assert positions is not None
    limit = positions.reach_of(config)
    # without a report, what the model takes is what it was made for
    made_for = (read_json(report).get("max_length") or [limit])[0] if report.is_file() else limit
    tokens = limit if length is None else length
    if positions.has_table and limit is not None and tokens is not None and tokens > limit:
        past_table = f"the table of positions ends at {limit:,} tokens, and texts of {tokens:,} are refused; convert with more (max_length)"
        return [past_table, *checkpoint_warnings(folder, config, is_causal)]
    return [
        *mark_warnings(config, family, config.architectures or []),
        *hearing_warnings(config, is_causal, tokens),
        *_length_warnings(made_for, tokens),
    ]


def mark_warnings(config: SparseConfigMixin, family: Family, architectures: list[str]) -> list[str]:
    """What to say of a pattern with `marked()` where neither the configuration nor the head marks any token."""
    head = next((c for c in family.classes if c.__name__ in architectures), family.classes[0])
    marks_itself = getattr(head, "default_marks", None) is not SparseMixin.default_marks
    if not config.uses_marks or config.global_token_ids or marks_itself:
        return []
    return [
        "marked() speaks of no token yet: pass global_attention_mask with every batch, or name token ids by "
        "global_token_ids (--global-token-ids), or write first(1) for the first token"
    ]


def _length_warnings(old: int | None, new: int | None) -> list[str]:
    """What to say where a model is to read more than it was made for."""
    if old is None or new is None or new <= old:
        return []
    return [
        f"the model was made for {old:,} tokens and is to read {new:,}: what it answers beyond {old:,} is unknown until it is healed or "
        "fine-tuned on texts as long, and measured (sparse-hf evaluate)"
    ]


def _without_weights_of_attention(source: Source) -> tuple[Source, list[str]]:
    """The source without a wish for attention weights, which a sparse model never makes."""
    if not source.config.get("output_attentions"):
        return source, []
    kept = {key: value for key, value in source.config.items() if key != "output_attentions"}
    warning = (
        "output_attentions of the dense configuration is left out: attention weights are n x n, and only "
        "attn_implementation='sparse_reference' makes them"
    )
    return dataclasses.replace(source, config=kept), [warning]


def _limit(choice: Choice, family: Family, length: int | None) -> TokenLimit | None:
    if choice.max_length is not None:
        return TokenLimit(choice.max_length, only_lowers=False)
    # beyond a table there are no positions, while rotary ones go on
    return TokenLimit(length, only_lowers=True) if family.positions.has_table and length is not None else None


def _architectures(config: dict, family: Family, model: PreTrainedModel) -> list[str]:
    names = config.get("architectures") or [type(model).__name__]
    return [family.architectures.get(name, name) for name in names]


def _left_out(source: Source) -> frozenset[str]:
    """Causal masks that old versions of Transformers saved with each layer: quadratic in the length, and read by nobody."""
    masks = {
        tensor.name.removesuffix("bias") + ending
        for tensor in source.tensors
        if tensor.name.endswith((".attn.bias", ".attention.bias"))
        and len(tensor.shape) == 4
        and tensor.shape[:2] == (1, 1)
        and tensor.shape[2] == tensor.shape[3]
        for ending in ("bias", "masked_bias")
    }
    return frozenset(tensor.name for tensor in source.tensors if tensor.name in masks)
