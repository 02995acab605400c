"""Plans: where the work of a pattern is, for these lengths and this batch."""

from __future__ import annotations

import math
import weakref
from collections import deque
from functools import lru_cache

import torch
from torch import Tensor

from ..pattern import Pattern
from .block_plan import BlockPlan, MaskFunction, Run
from .gathered import Call, Gathered, calls
from .joined import joined_rows
from .layout import make_layout
from .marked import MarkedParts, read_marked
from .memo import made, made_apart, remembered
from .reach import Reach, reach
from .regroup import AnyPlan, ByHeads, Regrouped, Strides, read_strides, regrouped, strided_plan
from .split import Shape, Split, read_pattern, split

__all__ = [
    "AnyPlan",
    "BlockPlan",
    "ByHeads",
    "Call",
    "Gathered",
    "MarkedParts",
    "MaskFunction",
    "Reach",
    "Regrouped",
    "Run",
    "Shape",
    "Split",
    "Strides",
    "build_plan",
    "cached_plan",
    "calls",
    "joined_rows",
    "made_apart",
    "make_layout",
    "reach",
    "read_marked",
    "read_pattern",
    "read_strides",
    "regrouped",
    "remembered",
    "split",
    "strided_plan",
]

BLOCK_SIZE = 128
# below this, blocks cost more than the masks that they save
SMALLEST = 32


def build_plan(
    pattern: Pattern | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    q_offset: int | None = None,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    marks: Tensor | None = None,
    mask_function: MaskFunction | None = None,
    block_size: int = BLOCK_SIZE,
    device=None,
) -> BlockPlan:
    """List the non-empty blocks of `pattern` for these lengths and this batch.

    Positions are counted per sequence: position 0 is the first real token of a left-padded row and of each packed
    document, so that packed equals separate and left-padded equals unpadded for every pattern.

    Args:
        pattern: a `Pattern` or its text; `per_head(...)` gives each head its own.
        q_len, kv_len: numbers of queries and keys; `kv_len` defaults to `q_len`.
        q_offset: key index of the first query; by default the queries are the last of the keys (decoding).
        key_padding_mask: `[B, K]`, true on real tokens.
        segment_ids: `[B, K]` integers that number the packed documents.
        marks: `[B, K]`, true on the tokens that `marked()` speaks of.
        mask_function: further `(batch, head, query, key) -> bool` mask on key coordinates, ANDed to the pattern. It is
            opaque, so that every block is evaluated element by element.
        block_size: queries and keys per block.
        device: where the tables live; by default that of the batch data, else the CPU.

    Raises:
        ValueError: lengths or shapes that do not fit together.
    """
    pattern = _as_pattern(pattern)
    kv_len = q_len if kv_len is None else kv_len
    q_offset = _checked_offset(q_len, kv_len, q_offset)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    heads = pattern.heads or (pattern,)
    patterns = tuple(dict.fromkeys(heads))
    if any(p.uses_content for p in patterns):
        raise ValueError(
            f"{pattern} chooses pairs from queries and keys, so that there is no plan of it before they are known; pass the "
            "pattern itself, and a 2-D attention mask"
        )
    asked_marks = marks if any(p.uses_marks for p in patterns) else None
    layout = make_layout(kv_len, key_padding_mask, segment_ids, asked_marks)
    given = next((t for t in (key_padding_mask, segment_ids, marks) if t is not None), None)
    device = torch.device(device or (given.device if given is not None else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # a mask function may look at the batch row, so that rows alike in every other respect may still differ
    batch_rows = given.shape[0] if mask_function is not None and given is not None else layout.rows
    return BlockPlan(
        patterns=patterns,
        heads=tuple(patterns.index(p) for p in heads) if pattern.heads else (),
        q_len=q_len,
        kv_len=kv_len,
        q_offset=q_offset,
        block_size=block_size,
        batch_rows=batch_rows,
        layout=layout.to(device),
        mask_function=mask_function,
        device=device,
    )


def cached_plan(
    pattern: str, q_len: int, kv_len: int, q_offset: int, batch: tuple, device, by_identity: bool = False,
    may_regroup: bool = False,
) -> AnyPlan:  # fmt: skip
    """`build_plan`, remembered: by its arguments when no batch data enters, else by the content of that data.

    `batch` is `(key_padding_mask, segment_ids, marks)`. Remembering by content is a pure function: a plan is reused only
    where building it again would give the same tables. With `by_identity`, tensors that are the very same objects,
    unchanged, are not compared: on a GPU that would make the host wait in every layer. Compiled code, which writes to its
    buffers unseen, must not ask for it. With `may_regroup` it is a plan of strides where those are worth it.
    """
    key = (pattern, q_len, kv_len, q_offset, str(device), may_regroup)
    if by_identity:
        for known, stamp, plan in _STAMPED:
            if known == key and stamp.fits(batch):
                return plan
    plan = _cached_by_content(key, batch)
    if by_identity and any(t is not None for t in batch) and not any(t is not None and t.is_inference() for t in batch):
        _STAMPED.appendleft((key, _Stamp(batch), plan))
    return plan


def _cached_by_content(key: tuple, batch: tuple) -> AnyPlan:
    kv_len = key[2]
    if batch[0] is not None and batch[0].shape[1:] == (kv_len,) and batch[0].all():
        # many models make a mask of ones where none is given; one of another shape is refused below
        batch = (None, *batch[1:])
    if all(t is None for t in batch):
        return _plan_without_batch(*key)
    for known, data, plan in _RECENT:
        if known == key and _same(data, batch):
            return plan
    plan = _build(*key, batch)
    _RECENT.appendleft((key, tuple(None if t is None else t.clone() for t in batch), plan))
    return plan


class _Stamp:
    """Which tensors these are, and in which version: every write of torch's own makes a new one."""

    def __init__(self, batch: tuple):
        self.tensors = tuple(None if t is None else (weakref.ref(t), t._version) for t in batch)

    def fits(self, batch: tuple) -> bool:
        return all(
            t is None if known is None else t is not None and known[0]() is t and known[1] == t._version
            for known, t in zip(self.tensors, batch, strict=True)
        )


# plans of the last batches: each layer of a model may have a pattern of its own
_RECENT: deque = deque(maxlen=32)
_STAMPED: deque = deque(maxlen=32)


@lru_cache(maxsize=64)
def _plan_without_batch(*key) -> AnyPlan:
    return made(_build, *key, (None, None, None))


def _build(
    pattern: str, q_len: int, kv_len: int, q_offset: int, device: str, may_regroup: bool, batch: tuple
) -> AnyPlan:
    # queries that are not all the tokens are few as a rule, and see what they see as blocks
    if may_regroup and q_len == kv_len and q_offset == 0:
        found = _worth_regrouping(_as_pattern(pattern), kv_len, batch, device)
        if found is not None:
            return found
    return build_plan(
        pattern,
        q_len,
        kv_len,
        q_offset=q_offset,
        key_padding_mask=batch[0],
        segment_ids=batch[1],
        marks=batch[2],
        block_size=_block_size(_as_pattern(pattern), device),
        device=device,
    )


def _worth_regrouping(pattern: Pattern, kv_len: int, batch: tuple, device: str) -> AnyPlan | None:
    """The pattern regrouped, if that is worth it for any head."""
    patterns = tuple(dict.fromkeys(pattern.heads or (pattern,)))
    found = [read_strides(one, kv_len) for one in patterns]
    found = [
        one if isinstance(one, Strides) and one.spares(kv_len, any(t is not None for t in batch)) else None
        for one in found
    ]
    if not any(found):
        return None
    plans = [
        _build(str(one), kv_len, kv_len, 0, device, False, batch) if strides is None
        else regrouped(strides, kv_len, batch, device)
        for one, strides in zip(patterns, found, strict=True)
    ]  # fmt: skip
    return ByHeads(tuple(map(patterns.index, pattern.heads)), tuple(plans)) if pattern.heads else plans[0]


def _block_size(pattern: Pattern, device: str) -> int:
    """Smaller blocks where the pattern's own make all of them full or empty.

    Kernels of a GPU know one size only. But they would be compiled for every pattern of every head, for minutes a layer, so
    that heads with patterns of their own get blocks that need no masks there too.
    """
    size = math.gcd(BLOCK_SIZE, pattern.grain)
    fits = size >= SMALLEST and (pattern.heads is not None or not device.startswith("cuda"))
    return size if fits else BLOCK_SIZE


def _same(one: tuple, other: tuple) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or (a.device == b.device and torch.equal(a, b)))
        for a, b in zip(one, other, strict=True)
    )


def _as_pattern(pattern: Pattern | str) -> Pattern:
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"pattern is a {type(pattern).__name__}; give a Pattern or its text, like 'window(255, 0)'")
    return _parsed(pattern)


@lru_cache(maxsize=256)
def _parsed(text: str) -> Pattern:
    return Pattern.parse(text)


def _checked_offset(q_len: int, kv_len: int, q_offset: int | None) -> int:
    if q_len < 0 or kv_len < 0:
        raise ValueError(f"lengths are q_len={q_len}, kv_len={kv_len}; they must not be negative")
    q_offset = kv_len - q_len if q_offset is None else q_offset
    if q_offset < 0 or q_offset + q_len > kv_len:
        raise ValueError(
            f"{q_len} queries from key index {q_offset} do not lie within {kv_len} keys; queries are tokens of the key "
            "sequence (self-attention), so pass q_offset with q_offset + q_len <= kv_len"
        )
    return q_offset
