"""Copy weights shard by shard: their names stay, and only tables of positions change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models import Family
from .source import SAFETENSORS, SAFETENSORS_INDEX, Source


def grow(table: Tensor, length: int, offset: int = 0) -> Tensor:
    """A table of positions `[old, ...]` grown to `length` positions by tiled copy: row i is row i modulo the old length.

    The first `offset` rows are no positions and stay. Tiling keeps the local order that heads have learned, which
    interpolation would blur (Longformer, arXiv:2004.05150, section 5).
    """
    head, rows = table[:offset], table[offset:]
    repeats = -(-length // rows.shape[0])
    return torch.cat([head, rows.repeat(repeats, *[1] * (rows.ndim - 1))[:length]]).contiguous()


def stream(source: Source, out: Path, family: Family, positions: int | None, advance) -> dict[str, list[list[int]]]:
    """Write every shard of `source` into `out` as safetensors; `positions` is the new length of the tables, or None.

    Returns the tensors that changed: name -> [old shape, new shape]. `advance(bytes)` is told of progress.
    """
    grown, weight_map, total = {}, {}, 0
    single = len(source.shards) == 1
    for number, shard in enumerate(source.shards, 1):
        name = SAFETENSORS if single else f"model-{number:05d}-of-{len(source.shards):05d}.safetensors"
        tensors = {}
        for key, tensor in _tensors(shard):
            changed = _changed(key, tensor, family, positions)
            if changed is not tensor:
                grown[key] = [list(tensor.shape), list(changed.shape)]
            tensors[key] = changed
            total += changed.numel() * changed.element_size()
        save_file(_untied(tensors), out / name, metadata={"format": "pt"})
        _sync(out / name)
        weight_map.update(dict.fromkeys(tensors, name))
        advance(shard.stat().st_size)
    if not single:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return grown


def _tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    if shard.suffix == ".safetensors":
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                yield key, file.get_tensor(key)
    else:
        yield from torch.load(shard, weights_only=True, map_location="cpu", mmap=_is_zip(shard)).items()


def _is_zip(shard: Path) -> bool:
    with shard.open("rb") as file:
        return file.read(2) == b"PK"


def _changed(key: str, tensor: Tensor, family: Family, positions: int | None) -> Tensor:
    if positions is None:
        return tensor
    if key.endswith(family.positions.tables) and family.positions.tables:
        return grow(tensor, positions, family.positions.offset)
    if family.positions.buffers and key.endswith(family.positions.buffers):
        # saved by old versions: consecutive numbers, or zeros
        fresh = torch.arange(positions) if key.endswith("position_ids") else torch.zeros(positions, dtype=tensor.dtype)
        return fresh.to(tensor.dtype).expand(*tensor.shape[:-1], -1).contiguous()
    return tensor


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory, as torch files may have them."""
    seen: set[int] = set()
    whole = {}
    for key, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        whole[key] = tensor.clone() if shared else tensor.contiguous()
    return whole


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
