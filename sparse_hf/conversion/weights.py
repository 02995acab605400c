"""Copy weights in pieces: their names stay, and memory holds one piece, or one table of positions, at a time."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .hub import SAFETENSORS, SAFETENSORS_INDEX
from .shards import DTYPES, Shard, Stored, forget

PIECE = 8 << 20
# files of torch are split at this size
LARGEST_FILE = 512 << 20


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor whose shape grows: `make(old)` gives the new one."""

    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """What is to be written: shards, the tensors that change and those that are left out."""

    shards: tuple[Shard, ...]
    changes: dict[str, Change]
    left_out: frozenset[str] = frozenset()

    def tensors(self, shard: Shard) -> list[Stored]:
        return [t for t in shard.tensors if t.name not in self.left_out]

    def as_it_is(self, shard: Shard) -> bool:
        return shard.ready and not any(t.name in self.changes or t.name in self.left_out for t in shard.tensors)

    def with_shard(self, shard: Shard) -> Work:
        """What is to be written, and a shard of new tensors, which may have the names of some that are left out."""
        kept = []
        for old in self.shards:
            tensors = tuple(self.tensors(old))
            kept.append(old if len(tensors) == len(old.tensors) else replace(old, tensors=tensors, ready=False))
        return Work((*kept, shard), self.changes)

    def shape(self, tensor: Stored) -> tuple[int, ...]:
        return self.changes[tensor.name].shape if tensor.name in self.changes else tensor.shape

    def size(self, tensor: Stored) -> int:
        change = self.changes.get(tensor.name)
        return DTYPES[tensor.dtype].itemsize * math.prod(change.shape) if change else tensor.size

    @property
    def source_bytes(self) -> int:
        return sum(t.size for shard in self.shards for t in self.tensors(shard))

    @property
    def bytes(self) -> int:
        return sum(self.size(t) for shard in self.shards for t in self.tensors(shard))


def write_weights(work: Work, out: Path, advance: Callable[[int], None]) -> None:
    """Write everything into the folder `out` as safetensors; `advance(bytes)` is told of progress."""
    files = [(shard, part) for shard in work.shards for part in _parts(work, shard)]
    weight_map: dict[str, str] = {}
    for number, (shard, part) in enumerate(files, 1):
        name = SAFETENSORS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(out / name, work, shard, part, advance)
        weight_map.update(dict.fromkeys((t.name for t in part), name))
        forget()
    if len(files) > 1:
        index = {"metadata": {"total_size": work.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (out / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _parts(work: Work, shard: Shard) -> list[list[Stored]]:
    """The tensors of each file to write: one per safetensors file, and as many as needed for a file of torch."""
    kept = work.tensors(shard)
    if shard.path.suffix == ".safetensors":
        return [kept] if kept else []
    parts: list[list[Stored]] = []
    room = 0
    for tensor in kept:
        if not parts or work.size(tensor) > room:
            parts.append([])
            room = LARGEST_FILE
        parts[-1].append(tensor)
        room -= work.size(tensor)
    return parts


def write_file(path: Path, work: Work, shard: Shard, part: list[Stored], advance: Callable[[int], None]) -> None:
    """Write one file whole, and wait until it is on the disk."""
    with path.open("wb") as out:
        if work.as_it_is(shard):
            _copy(shard.path, 0, shard.path.stat().st_size, out, advance)
        else:
            # the widest numbers first, so that every tensor begins at a multiple of its width
            part = sorted(part, key=lambda t: (-_width(t), t.name))
            out.write(_header(work, part))
            for tensor in part:
                _write_tensor(tensor, work.changes.get(tensor.name), out, advance)
        out.flush()
        os.fsync(out.fileno())


def _width(tensor: Stored) -> int:
    return DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 1


def _header(work: Work, part: list[Stored]) -> bytes:
    """8 bytes of length, then JSON padded with spaces to a multiple of 8, as the format of safetensors has it."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in part:
        begin, end = end, end + work.size(tensor)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": work.shape(tensor), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(tensor: Stored, change: Change | None, out: BinaryIO, advance: Callable[[int], None]) -> None:
    if change is None and tensor.begin is not None:
        _copy(tensor.file, tensor.begin, tensor.size, out, advance)
        return
    content = tensor.load() if change is None else change.make(tensor.load()).contiguous()
    assert change is None or tuple(content.shape) == change.shape, tensor.name
    if content.numel():
        # as bytes, because numpy has no bfloat16
        out.write(content.reshape(-1).view(torch.uint8).numpy().data)
    advance(tensor.size)


def _copy(source: Path, begin: int, size: int, out: BinaryIO, advance: Callable[[int], None]) -> None:
    piece = memoryview(bytearray(min(PIECE, size)))
    with source.open("rb", buffering=0) as file:
        file.seek(begin)
        while size:
            read = file.readinto(piece[: min(len(piece), size)])
            if not read:
                raise ValueError(f"{source} ended {size:,} bytes early; something changed it during the conversion")
            out.write(piece[:read])
            size -= read
            advance(read)
