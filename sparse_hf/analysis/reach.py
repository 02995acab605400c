"""Which tokens a token reaches through some layers: sets of tokens as bits, never a float per pair.

Legend: n tokens, B block size, W words of 64 bits that hold a set of tokens, n / 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..plan.block_plan import BlockPlan

# unions of words that an exact answer may cost, a few seconds
MAX_UNIONS = 2_000_000_000
# tokens whose sets are kept, 32 MiB
MAX_EXACT_TOKENS = 16_384
# layers beyond which nobody asks
MAX_LAYERS = 1000
# blocks per side of the matrix of longer sequences
MAX_MATRIX_BLOCKS = 2048
# rows of sets that are packed at once
PACKED_AT_ONCE = 1024


@dataclass(frozen=True)
class Reach:
    """`layers` until every token reaches all that it may reach; None: never, or `is_beyond` `MAX_LAYERS`.

    All are the earlier ones if nothing `looks_ahead`. Where `unit` is more than 1, blocks of so many tokens are counted.
    """

    layers: int | None
    looks_ahead: bool
    unit: int = 1
    is_beyond: bool = False


def reach(plans: Sequence[BlockPlan]) -> Reach:
    """After how many layers every token reaches every other, if layers have these plans in turn, over and over.

    A token keeps what it has reached (residual connections), and heads are taken together. Exact up to 16,384 tokens where
    sets can be joined in some seconds, else on blocks.

    Args:
        plans: of whole sequences of one length, batch row 0.
    """
    length = plans[0].q_len
    if length <= MAX_EXACT_TOKENS:
        found = _exact([_Layer(plan) for plan in plans], length)
        if found is not None:
            return found
    return _on_blocks(plans)


class _Layer:
    """A plan as lists: per query block the full key blocks, and of the other keys the pairs, row by row."""

    def __init__(self, plan: BlockPlan):
        self.size, self.looks_ahead = plan.block_size, False
        self.full: list[set[int]] = [set() for _ in range(plan.q_blocks)]
        self.keys: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(plan.q_blocks)]
        for row, runs in enumerate(plan.runs[: len(plan.patterns) * plan.q_blocks]):
            p, i = divmod(row, plan.q_blocks)
            for run in runs:
                partial = {c for first, last in run.partial for c in range(first, last + 1)}
                self.full[i] |= set(range(run.first, run.last + 1)) - partial
                for first, last in run.partial:
                    self._add(plan, p, i, first, last)
            ahead = any(c > i or (c == i and plan.q_len > i * self.size + 1) for c in self.full[i])
            self.looks_ahead = self.looks_ahead or ahead
        self.pairs = sum(len(q) for pairs in self.keys for q, _ in pairs) + sum(map(len, self.full))

    def _add(self, plan: BlockPlan, p: int, i: int, first: int, last: int) -> None:
        q_range, k_range = plan.block_range(i, i, plan.q_len), plan.block_range(first, last, plan.kv_len)
        q, k = plan.mask(0, p, q_range, k_range).cpu().numpy().nonzero()
        q, k = q + q_range[0], k + k_range[0]
        self.looks_ahead = self.looks_ahead or bool((k > q).any())
        if len(q):
            self.keys[i].append((q, k))

    def alone(self, length: int) -> np.ndarray:
        """What each token sees in this layer, and itself: `[n, W]`."""
        packed = np.empty((length, -(-length // 64)), dtype=np.uint64)
        for i, (full, pairs) in enumerate(zip(self.full, self.keys, strict=True)):
            first, last = i * self.size, min((i + 1) * self.size, length)
            reached = np.zeros((last - first, packed.shape[1] * 64), dtype=bool)
            reached[np.arange(last - first), np.arange(first, last)] = True
            for block in full:
                reached[:, block * self.size : min((block + 1) * self.size, length)] = True
            for q, k in pairs:
                reached[q - first, k] = True
            packed[first:last] = np.packbits(reached, axis=1, bitorder="little").view(np.uint64)
        return packed

    def after(self, reached: np.ndarray) -> np.ndarray:
        """What each token reaches after this layer, given what it has reached before: `[n, W]`."""
        now = reached.copy()
        blocks = np.bitwise_or.reduceat(reached, np.arange(0, len(reached), self.size), axis=0)
        for i, (full, pairs) in enumerate(zip(self.full, self.keys, strict=True)):
            if full:
                now[i * self.size : (i + 1) * self.size] |= np.bitwise_or.reduce(blocks[sorted(full)], axis=0)
            for q, k in pairs:
                begins = np.flatnonzero(np.diff(q, prepend=-1))
                now[q[begins]] |= np.bitwise_or.reduceat(reached[k], begins, axis=0)
        return now


def _exact(layers: list[_Layer], length: int) -> Reach | None:
    looks_ahead = any(layer.looks_ahead for layer in layers)
    wanted, reached = _wanted(length, looks_ahead), layers[0].alone(length)
    work = still = 0
    for number in range(1, MAX_LAYERS + 1):
        if np.array_equal(reached & wanted, wanted):
            return Reach(number, looks_ahead)
        layer = layers[number % len(layers)]
        work += layer.pairs * reached.shape[1]
        if work > MAX_UNIONS:
            return None
        now = layer.after(reached)
        still = still + 1 if np.array_equal(now, reached) else 0
        if still == len(layers):
            return Reach(None, looks_ahead)
        reached = now
    return Reach(None, looks_ahead, is_beyond=True)


def _wanted(length: int, looks_ahead: bool) -> np.ndarray:
    """What each token may reach, `[n, W]`: every token, or those up to itself."""
    packed = np.empty((length, -(-length // 64)), dtype=np.uint64)
    key = np.arange(packed.shape[1] * 64)
    for first in range(0, length, PACKED_AT_ONCE):
        token = np.arange(first, min(first + PACKED_AT_ONCE, length))[:, None]
        kept = (key < length) & (looks_ahead | (key <= token))
        packed[first : first + PACKED_AT_ONCE] = np.packbits(kept, axis=1, bitorder="little").view(np.uint64)
    return packed


def _on_blocks(plans: Sequence[BlockPlan]) -> Reach:
    # blocks of the plan, joined until the matrix is small
    join = -(-plans[0].q_blocks // MAX_MATRIX_BLOCKS)
    steps = [_adjacency(plan, join) for plan in plans]
    side, unit = steps[0].shape[0], join * plans[0].block_size
    looks_ahead = any(bool(step.triu(1).any()) for step in steps)
    wanted = torch.ones(side, side, dtype=torch.bool)
    wanted = wanted if looks_ahead else wanted.tril()
    reached, still = torch.eye(side, dtype=torch.bool), 0
    for number in range(MAX_LAYERS):
        now = reached | ((steps[number % len(steps)].float() @ reached.float()) > 0)
        if bool((now | ~wanted).all()):
            return Reach(number + 1, looks_ahead, unit)
        still = still + 1 if bool((now == reached).all()) else 0
        if still == len(steps):
            return Reach(None, looks_ahead, unit)
        reached = now
    return Reach(None, looks_ahead, unit, is_beyond=True)


def _adjacency(plan: BlockPlan, join: int) -> torch.Tensor:
    """Which blocks see which in one layer, heads together."""
    side = -(-plan.q_blocks // join)
    counts = plan.row_offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts)), counts) % plan.q_blocks
    step = torch.zeros(side, side, dtype=torch.bool)
    step[row // join, plan.columns.long() // join] = True
    return step
