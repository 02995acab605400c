"""Everything that a conversion will do, decided and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from ..models import Family, family_of
from .check import check_fits, is_causal, meta_model, sparse_config
from .positions import changes, check_choice, scale_rope, set_length
from .source import Source
from .weights import Work


@dataclass(frozen=True)
class Choice:
    """What the user asked for, see `convert`."""

    pattern: object = None
    layers: object = None
    max_length: int | None = None
    positions: str = "tile"
    rope: str | None = None
    global_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A conversion that passed every check: the new configuration and what happens to each tensor."""

    source: Source
    choice: Choice
    family: Family
    config: PreTrainedConfig
    work: Work
    lengths: tuple[int | None, int | None]
    is_causal: bool


def prepare(source: Source, choice: Choice) -> Prepared:
    """Decide everything.

    Raises:
        ValueError: an unsupported family, a bad choice, or weights that do not fit the configuration.
    """
    check_choice(choice.positions, choice.rope, choice.max_length)
    family = family_of(source.config["model_type"])
    if source.config.get("sparse_attention") is not None:
        # it will be replaced, but one that does not fit says that something else is wrong
        sparse_config(family, source.config)
    config = family.config_class.from_dense(source.config, choice.pattern, choice.layers, choice.global_token_ids)
    model = meta_model(family, source.config)
    config.architectures = _architectures(source.config, family, model)
    computed = family.positions.tables if family.positions.scheme == "sinusoidal" else ()
    # quantised weights are stored packed, under shapes of their own
    if source.shards and not source.config.get("quantization_config"):
        check_fits(source.tensors, model, computed, source.folder)
    lengths = set_length(config, family.positions, choice.max_length)
    scale_rope(config, family, choice.rope, *lengths)
    grown = changes(source.tensors, family.positions, *lengths, choice.positions)
    work = Work(source.shards, grown, _left_out(source))
    return Prepared(source, choice, family, config, work, lengths, is_causal(model))


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
