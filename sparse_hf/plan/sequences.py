"""What one batch adds to a pattern: where its sequences begin, what is padding, what is marked.

Legend: B batch rows (1 when all rows are alike), K keys. All tensors are in key coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """Batch data in the form that plans need; `None` means that there is nothing to say.

    `start[b, x]` is the index at which the sequence of token x begins (-1 before the first real token), so that
    `x - start` is its position; `end[b, x]` is the index of that sequence's last real token. Padding inherits both from
    the token before it, which keeps `start` non-decreasing along the row.
    """

    start: Tensor | None = None  # [B, K] int32
    end: Tensor | None = None  # [B, K] int32
    real: Tensor | None = None  # [B, K] bool
    marks: Tensor | None = None  # [B, K] bool

    @property
    def rows(self) -> int:
        """Batch rows."""
        return next((t.shape[0] for t in self.tensors() if t is not None), 1)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(*(None if t is None else t.to(device) for t in self.tensors()))

    def collapsed(self) -> Sequences:
        """One row where all rows are alike, so that one plan serves the batch."""
        if all((t == t[:1]).all() for t in self.tensors() if t is not None):
            return Sequences(*(None if t is None else t[:1] for t in self.tensors()))
        return self


def find_sequences(
    kv_len: int,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    marks: Tensor | None = None,
) -> Sequences:
    """Read the batch's own data. What is kept of it is a copy, since its memory may be written to later.

    Args:
        kv_len: number of keys K.
        key_padding_mask: `[B, K]`, true on real tokens.
        segment_ids: `[B, K]` integers that number the packed documents; a document's tokens must be contiguous.
        marks: `[B, K]`, true on the tokens that `marked()` speaks of.

    Raises:
        ValueError: a shape that is not `[B, K]`, batch sizes that differ, or a document in several pieces.
    """
    _check_shapes(kv_len, {"key_padding_mask": key_padding_mask, "segment_ids": segment_ids, "marks": marks})
    real, marks = _flags(key_padding_mask), _flags(marks)
    # a batch of real tokens, or without marks, has nothing to say
    real = None if real is None or real.all() else real
    marks = None if marks is None or not marks.any() else marks
    start = end = None
    if real is not None or segment_ids is not None:
        start, end = _bounds(real, segment_ids)
        if real is None and not start.any():
            start = end = None
    return Sequences(start, end, real, marks).collapsed()


def _check_shapes(kv_len: int, given: dict[str, Tensor | None]) -> None:
    tensors = {name: value for name, value in given.items() if value is not None}
    for name, value in tensors.items():
        if value.ndim != 2 or value.shape[1] != kv_len:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it is in key coordinates and must be [batch, {kv_len}]"
            )
    if len({value.shape[0] for value in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ValueError(f"batch sizes differ: {shapes}")


def _flags(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.detach().to(torch.bool, copy=True)


def _bounds(real: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each token's sequence starts and ends: two `[B, K]` int32 tensors. One of the arguments is there."""
    if real is None:
        assert segment_ids is not None
        real = torch.ones_like(segment_ids, dtype=torch.bool)
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last_real = torch.where(real, index, -1).cummax(1).values
    previous = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    begins = real & (previous < 0)
    if segment_ids is not None:
        begins |= real & (previous >= 0) & (segment_ids != segment_ids.gather(1, previous.clamp(min=0)))
        _refuse_split_documents(real, segment_ids, begins)
    start = torch.where(begins, index, -1).cummax(1).values
    slot = start.clamp(min=0)
    ends = torch.full_like(start, -1).scatter_reduce(1, slot, torch.where(real, index, -1), "amax")
    return start.int(), ends.gather(1, slot).int()


def _refuse_split_documents(real: Tensor, segment_ids: Tensor, begins: Tensor) -> None:
    # padding gets the id of the row's first real token, so that it adds no document of its own
    first = segment_ids.gather(1, real.int().argmax(1, keepdim=True))
    ordered = torch.where(real, segment_ids, first).sort(1).values
    documents = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    split = begins.sum(1) > documents
    if split.any():
        row = int(split.nonzero()[0])
        raise ValueError(f"segment_ids: row {row} has a document in several pieces; its tokens must be contiguous")
