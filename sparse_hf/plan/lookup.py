"""The plan of a call, looked up or made.

Plans of lengths alone are remembered by these. Plans of batch data are remembered on the `BatchInfo` that a forward pass
shares, and across passes by the content of that data: a plan is reused only where building it again would give the same
tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..pattern import Pattern
from ..pattern.forms import StrideForm, read_stride
from .api import BLOCK_SIZE, build_plan
from .batch import NOTHING, BatchInfo, PlanCache
from .block_plan import BlockPlan
from .cache import made
from .per_head import AnyPlan, ByHeads
from .strided import Regrouped, is_worth_regrouping, regrouped

# tokens of a block below which blocks cost more than the masks that they save
SMALLEST_BLOCK = 32
# plans of lengths alone, and of batches, that are kept: each layer of a model may have a pattern of its own
LENGTHS_KEPT, BATCHES_KEPT = 64, 32


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on beside the batch."""

    pattern: Pattern
    q_len: int
    kv_len: int
    q_offset: int
    device: torch.device


def find_plan(key: PlanKey, batch: BatchInfo) -> BlockPlan:
    """The plan in blocks of a pattern, for these lengths and this batch."""
    plan = _found("blocks", _build, key, batch)
    assert isinstance(plan, BlockPlan)
    return plan


def find_strided_plan(key: PlanKey, batch: BatchInfo) -> Regrouped | ByHeads | None:
    """The plan of strides whose tokens stand side by side; None where that is not worth it."""
    # queries that are not all the tokens are few as a rule, and see what they see as blocks
    if key.q_len != key.kv_len or key.q_offset or not _may_have_strides(key.pattern, key.kv_len):
        return None
    plan = _found("strided", _regroup, key, batch)
    assert not isinstance(plan, BlockPlan)
    return plan


def _found(kind: str, build: Callable, key: PlanKey, batch: BatchInfo) -> AnyPlan | None:
    batch = batch if batch.is_empty else batch.without_ones()
    if batch.is_empty:
        return _of_lengths(build, key)
    own = kind, key
    if own not in batch.memo:
        wanted = (*own, batch.content())
        plan = _PLANS.get(wanted)
        batch.memo[own] = plan if plan is not None else _PLANS.put(wanted, made(build, key, batch))
    return batch.memo[own]


_PLANS = PlanCache(BATCHES_KEPT)


@lru_cache(maxsize=LENGTHS_KEPT)
def _of_lengths(build: Callable, key: PlanKey) -> AnyPlan | None:
    return made(build, key, NOTHING)


def forget_plans() -> None:
    """Drop all that is remembered; for tests that change what plans are made of."""
    _PLANS.clear()
    _of_lengths.cache_clear()
    _may_have_strides.cache_clear()
    NOTHING.memo.clear()


def _build(key: PlanKey, batch: BatchInfo) -> BlockPlan:
    return build_plan(
        key.pattern,
        key.q_len,
        key.kv_len,
        q_offset=key.q_offset,
        key_padding_mask=batch.padding,
        segment_ids=batch.segments,
        marks=batch.marks,
        block_size=_block_size(key.pattern, key.device),
        device=key.device,
    )


@lru_cache(maxsize=256)
def _may_have_strides(pattern: Pattern, kv_len: int) -> bool:
    return any(isinstance(read_stride(one, kv_len), StrideForm) for one in dict.fromkeys(pattern.heads or (pattern,)))


def _regroup(key: PlanKey, batch: BatchInfo) -> Regrouped | ByHeads | None:
    """The pattern regrouped, if that is worth it for any head."""
    patterns = tuple(dict.fromkeys(key.pattern.heads or (key.pattern,)))
    forms = [read_stride(one, key.kv_len) for one in patterns]
    worth = [
        form if isinstance(form, StrideForm) and is_worth_regrouping(form, key.kv_len, not batch.is_empty) else None
        for form in forms
    ]
    if not any(worth):
        return None
    plans = tuple(
        _build(PlanKey(one, key.q_len, key.kv_len, 0, key.device), batch)
        if form is None
        else regrouped(form, key.kv_len, batch.tensors, key.device)
        for one, form in zip(patterns, worth, strict=True)
    )
    if key.pattern.heads:
        return ByHeads(tuple(map(patterns.index, key.pattern.heads)), plans)
    (plan,) = plans
    assert isinstance(plan, Regrouped)
    return plan


def _block_size(pattern: Pattern, device: torch.device) -> int:
    """Smaller blocks where the pattern's own make all of them full or empty.

    Kernels of a GPU know one size only. But they would be compiled for every pattern of every head, for minutes a layer, so
    that heads with patterns of their own get blocks that need no masks there too.
    """
    size = math.gcd(BLOCK_SIZE, pattern.grain)
    fits = size >= SMALLEST_BLOCK and (pattern.heads is not None or device.type != "cuda")
    return size if fits else BLOCK_SIZE
