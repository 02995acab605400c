"""Where each tensor of a checkpoint lies on disk, read off headers: no weight is touched."""

from __future__ import annotations

import json
import math
import pickle
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# torch's types by the names that safetensors gives them
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# the limit of safetensors itself
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor of a shard: `size` bytes from `begin` on, or, where `begin` is None, one that torch must load."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    file: Path
    begin: int | None

    def load(self) -> Tensor:
        if self.begin is None:
            return _load_torch(self.file)[self.name].contiguous()
        with self.file.open("rb") as file:
            file.seek(self.begin)
            content = bytearray(file.read(self.size))
        if not content:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Shard:
    """A file of weights; one that is `ready` is as we would write it, so that it can be copied byte for byte."""

    path: Path
    tensors: tuple[Stored, ...]
    ready: bool


def read_shard(path: Path) -> Shard:
    """The tensors of a file.

    Raises:
        ValueError: a file that is cut off or is not what its name says.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; the checkpoint was only half written")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> Shard:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        header = file.read(length) if length <= min(size, LARGEST_HEADER) else b""
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has no readable header; the checkpoint was only half written") from error
    tensors.sort(key=_begin_of)
    promised = max((_begin_of(t) + t.size for t in tensors), default=8 + length)
    if promised != size:
        raise ValueError(f"{path} has {size:,} bytes and its header promises {promised:,}; it was only half written")
    for tensor in tensors:
        wanted = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else tensor.size
        if wanted != tensor.size:
            raise ValueError(
                f"{path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, which is {wanted:,} bytes, and its header "
                f"gives it {tensor.size:,}; the checkpoint is damaged"
            )
    return Shard(path, tuple(tensors), metadata.get("format") == "pt")


def _begin_of(tensor: Stored) -> int:
    assert tensor.begin is not None, tensor.name
    return tensor.begin


def _entry(path: Path, name: str, entry: dict, data: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return Stored(name, entry["dtype"], shape, end - begin, path, data + begin)


def _read_torch(path: Path) -> Shard:
    """A torch file is a zip archive, in which each tensor lies as raw bytes, or an old pickle, which is loaded whole."""
    if not _is_zip(path):
        entries = tuple(_torch_entry(path, name, tensor, None) for name, tensor in _load_torch(path).items())
        forget()
        return Shard(path, entries, False)
    try:
        # fake tensors have shapes, and know where in the file their numbers are
        with FakeTensorMode():
            fakes = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {_first_line(error)}") from error
    tensors = []
    for name, tensor in _state_dict(path, fakes).items():
        offset = tensor.untyped_storage()._checkpoint_offset
        begin = None
        if offset is not None and tensor.is_contiguous():
            begin = int(offset + tensor.storage_offset() * tensor.element_size())
        tensors.append(_torch_entry(path, name, tensor, begin))
    return Shard(path, tuple(tensors), False)


def _torch_entry(path: Path, name: str, tensor: Tensor, begin: int | None) -> Stored:
    if tensor.dtype not in NAMES:
        raise ValueError(f"{path}: {name} is {tensor.dtype}, which safetensors cannot hold; convert it first")
    return Stored(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size(), path, begin)


# one at a time, for the tensors that are no plain range of bytes
@lru_cache(maxsize=1)
def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=_is_zip(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {_first_line(error)}") from error
    return _state_dict(path, loaded)


def _state_dict(path: Path, loaded) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(
            f"{path} holds no state dict (names and tensors); give a checkpoint that save_pretrained wrote"
        )
    return dict(loaded)


def forget() -> None:
    """Let go of the torch file that was loaded last."""
    _load_torch.cache_clear()


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
