"""What one batch adds to a pattern: where its sequences begin, what is padding, what is marked.

Legend: B batch rows (1 when all rows are alike), K keys. All tensors are in key coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
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
        return next((t.shape[0] for t in self.tensors() if t is not None), 1)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, device) -> Layout:
        return Layout(*(None if t is None else t.to(device) for t in self.tensors()))

    def collapsed(self) -> Layout:
        """One row where all rows are alike, so that one plan serves the batch."""
        if all((t == t[:1]).all() for t in self.tensors() if t is not None):
            return Layout(*(None if t is None else t[:1] for t in self.tensors()))
        return self


def make_layout(
    kv_len: int,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    marks: Tensor | None = None,
) -> Layout:
    """Read the batch's own data.

    Args:
        kv_len: number of keys K.
        key_padding_mask: `[B, K]`, true on real tokens.
        segment_ids: `[B, K]` integers that number the packed documents; a document's tokens must be contiguous.
        marks: `[B, K]`, true on the tokens that `marked()` speaks of.

    Raises:
        ValueError: a shape that is not `[B, K]`, batch sizes that differ, or a document in several pieces.
    """
    given = {"key_padding_mask": key_padding_mask, "segment_ids": segment_ids, "marks": marks}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value.ndim != 2 or value.shape[1] != kv_len:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it is in key coordinates and must be [batch, {kv_len}]"
            )
    if len({value.shape[0] for value in given.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise ValueError(f"batch sizes differ: {shapes}")
    real = None if key_padding_mask is None else key_padding_mask.bool()
    if real is not None and real.all():
        real = None
    marks = None if marks is None else marks.bool()
    if marks is not None and not marks.any():
        marks = None
    start = end = None
    if real is not None or segment_ids is not None:
        everything = torch.ones_like(segment_ids, dtype=torch.bool) if real is None else real
        start, end = _sequences(everything, segment_ids)
        if real is None and not start.any():
            start = end = None
    return Layout(start, end, real, marks).collapsed()


def _sequences(real: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each token's sequence starts and ends: two `[B, K]` int32 tensors."""
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
