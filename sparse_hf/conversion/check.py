"""Do the weights fit the configuration? Asked of Transformers' own classes, which are built without memory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.initialization import no_init_weights

from ..models.hf.config import SparseConfigMixin, dense_values
from ..models.hf.register import Family, dense_class
from .shards import Stored

SHOWN = 3


def meta_model(family: Family, config: dict) -> PreTrainedModel:
    """The dense model that a configuration describes, without weights."""
    dense = family.dense_config_class(**dense_values(config))
    known = {name: dense_class(c) for c in family.classes for name in (c.__name__, dense_class(c).__name__)}
    named = [known[name] for name in config.get("architectures") or () if name in known]
    # the table's type says tuple, which it holds for other configurations than these
    model_class: Any = named[0] if named else MODEL_MAPPING[type(dense)]
    with torch.device("meta"), no_init_weights():
        return model_class(dense)


def sparse_config(family: Family, config: dict) -> SparseConfigMixin:
    """The sparse configuration that a `config.json` describes.

    Raises:
        ValueError: its `sparse_attention` does not fit the model.
    """
    return family.config_class(**dense_values(config), sparse_attention=config.get("sparse_attention"))


def sees_past_only(stack: str, causal_model: bool) -> bool:
    """Does a stack of layers see its past only? Of an encoder-decoder, the name of the stack says so."""
    return stack == "decoder" if stack else causal_model


def check_fits(tensors: Iterable[Stored], model: PreTrainedModel, tables: tuple[str, ...], folder: Path) -> None:
    """Raise ValueError if a tensor has another shape than `model` gives it, or if one is missing.

    Names are read as Transformers reads them: with or without the prefix of the base model, in their old spellings, and
    experts one by one. Allowed are tensors that the model does not know, and that tied ones, buffers and the `tables` that
    it computes itself are absent.
    """
    wanted, there, wrong = model.state_dict(), set(), []
    # renamings of every kind, which `rename_source_key` annotates as those of one
    transforms: list[Any] = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    for tensor in tensors:
        name, matched = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and tensor.name in wanted:
            # an old spelling of another tensor
            name, matched = tensor.name, None
        there |= _made_of(name, matched, converters)
        # what a converter merges or splits has its final shape only afterwards
        if matched is None and name in wanted and tuple(wanted[name].shape) != tensor.shape:
            wrong.append(f"{tensor.name} is {list(tensor.shape)} and should be {list(wanted[name].shape)}")
    lost = [
        f"{name} {list(wanted[name].shape)} is missing"
        for name in sorted(wanted.keys() - there - _dispensable(model, there))
        if not (tables and name.endswith(tables))
    ]
    _refuse(wrong + lost, model, folder, bool(lost) and not wrong)


def _made_of(name: str, matched: str | None, converters: list[WeightConverter]) -> set[str]:
    """The names that a tensor has in the model: several, where one is split. Renaming gives the first of them."""
    converter = next((c for c in converters if matched in c.source_patterns), None)
    if converter is None:
        return {name}
    first, *_ = targets = converter.target_patterns
    return {name.replace(first, target, 1) for target in targets}


def _dispensable(model: PreTrainedModel, there: set[str]) -> set[str]:
    """Names that may be absent: buffers, weights tied to one that is there, and what Transformers itself does not miss."""
    names = {name for name, _ in model.named_buffers()}
    tied = model.all_tied_weights_keys
    groups: dict[str, set[str]] = {}
    for name, source in tied.items():
        groups.setdefault(source, {source}).add(name)
    for group in groups.values():
        names |= group if group & there else set()
    ignored = [*(model._keys_to_ignore_on_load_missing or ())]
    if model.base_model is model:
        # checkpoints without a head often come without a pooler too, and load in Transformers
        ignored.append(r"(^|\.)pooler\.")
    return names | {name for name in model.state_dict() if any(re.search(pattern, name) for pattern in ignored)}


def _refuse(problems: list[str], model: PreTrainedModel, folder: Path, only_lost: bool) -> None:
    if not problems:
        return
    more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
    remedy = (
        "name in config.json's architectures a class that has no more than these weights"
        if only_lost
        else "take config.json and weights from the same checkpoint"
    )
    raise ValueError(
        f"{folder}: the weights do not fit {type(model).__name__} of config.json: {'; '.join(problems[:SHOWN])}{more}; "
        f"{remedy}"
    )
