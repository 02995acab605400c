"""Weights of the indexers that `topk(..., 'indexer')` gives a model: new ones are written beside those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..models.hf.config import SparseConfigMixin
from ..models.hf.indexer import NAME, Indexer
from ..models.hf.register import Family
from ..pattern.base import as_pattern
from .shards import DTYPES, Stored

# of new weights, which are the same whenever a checkpoint is converted
SEED = 0
_PARAMETERS = tuple(f"{NAME}.{name}" for name, _ in Indexer(1, 1, 1, 0).named_parameters())


def find_indexers(family: Family, config: SparseConfigMixin) -> dict[str, Indexer]:
    """The indexers that a model of this configuration has, without memory, by name.

    Raises:
        ValueError: a family that can have none.
    """
    if set(config.stacks) != {""} or not any(as_pattern(text).uses_indexer for text in config.layer_patterns()):
        return {}
    named = (config.architectures or [""])[0]
    kind: Any = next((one for one in family.classes if one.__name__ == named), family.classes[0])
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = kind(config)
    return {name: module for name, module in model.named_modules() if isinstance(module, Indexer)}


def of_indexers(
    tensors: Iterable[Stored], config: SparseConfigMixin | type[SparseConfigMixin]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what belongs to indexers that a pattern has given a model; those that a family brings are its own weights."""
    if config.chooses_keys:
        return {}
    return {tensor.name: tensor.shape for tensor in tensors if tensor.name.endswith(_PARAMETERS)}


def split_indexers(
    tensors: Iterable[Stored], indexers: dict[str, Indexer], config: SparseConfigMixin
) -> tuple[dict[str, Indexer], frozenset[str]]:
    """Those of the indexers that a checkpoint has no weights of, and its tensors that belong to none.

    Weights of an indexer are taken as a whole, if they all have its shapes.
    """
    stored = of_indexers(tensors, config)
    shapes = {
        name: {f"{name}.{parameter}": tuple(value.shape) for parameter, value in found.named_parameters()}
        for name, found in indexers.items()
    }
    there = {name for name, wanted in shapes.items() if wanted.items() <= stored.items()}
    taken = {tensor for name in there for tensor in shapes[name]}
    return {name: found for name, found in indexers.items() if name not in there}, frozenset(stored.keys() - taken)


def write_new(indexers: dict[str, Indexer], dtype: str, path: Path) -> None:
    """Write new weights of indexers into a safetensors file; `dtype` is named as there."""
    made = {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        for name, found in indexers.items():
            new = Indexer(found.wq.in_features, found.heads, found.width, found.slot).to(DTYPES[dtype])
            made |= {f"{name}.{parameter}": value.detach() for parameter, value in new.named_parameters()}
    save_file(made, path, metadata={"format": "pt"})
