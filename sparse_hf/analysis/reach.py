"""Who has heard of whom after some layers: sets of tokens as bits, never a float per pair.

Legend: n tokens, B block size, W words of 64 bits that hold a set of tokens, n / 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..plan.block_plan import BlockPlan

# unions of words that an exact answer may cost, a few seconds
WORK = 2_000_000_000
# tokens whose sets are kept, 32 MiB
LONGEST = 16_384
# layers beyond which nobody asks
DEEPEST = 1000
# blocks per side of the matrix on which long sequences are looked at
FIELD_BLOCKS = 2048


@dataclass(frozen=True)
class Reach:
    """`layers` until every token has heard of all it may hear of; None: never, or `is_beyond` `DEEPEST`.

    All are the earlier ones if nothing `looks_ahead`. `unit` tokens are told apart as little as those of a block.
    """

    layers: int | None
    looks_ahead: bool
    unit: int = 1
    is_beyond: bool = False


def reach(plans: Sequence[BlockPlan]) -> Reach:
    """After how many layers every token has heard of every other, if layers have these plans in turn, over and over.

    A token keeps what it has heard (residual connections), and heads are taken together. Exact up to 16,384 tokens where
    sets can be joined in some seconds, else on blocks.

    Args:
        plans: of whole sequences of one length, batch row 0.
    """
    length = plans[0].q_len
    if length <= LONGEST:
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
        self.pairs = sum(len(q) for parts in self.keys for q, _ in parts) + sum(map(len, self.full))

    def _add(self, plan: BlockPlan, p: int, i: int, first: int, last: int) -> None:
        q_range, k_range = plan.block_range(i, i, plan.q_len), plan.block_range(first, last, plan.kv_len)
        q, k = plan.mask(0, p, q_range, k_range).cpu().numpy().nonzero()
        q, k = q + q_range[0], k + k_range[0]
        self.looks_ahead = self.looks_ahead or bool((k > q).any())
        if len(q):
            self.keys[i].append((q, k))

    def alone(self, length: int) -> np.ndarray:
        """What each token hears in this layer, and itself: `[n, W]`."""
        packed = np.empty((length, -(-length // 64)), dtype=np.uint64)
        for i, (full, parts) in enumerate(zip(self.full, self.keys, strict=True)):
            first, last = i * self.size, min((i + 1) * self.size, length)
            heard = np.zeros((last - first, packed.shape[1] * 64), dtype=bool)
            heard[np.arange(last - first), np.arange(first, last)] = True
            for block in full:
                heard[:, block * self.size : min((block + 1) * self.size, length)] = True
            for q, k in parts:
                heard[q - first, k] = True
            packed[first:last] = np.packbits(heard, axis=1, bitorder="little").view(np.uint64)
        return packed

    def after(self, heard: np.ndarray) -> np.ndarray:
        """What each token has heard after this layer, `[n, W]`."""
        now = heard.copy()
        blocks = np.bitwise_or.reduceat(heard, np.arange(0, len(heard), self.size), axis=0)
        for i, (full, parts) in enumerate(zip(self.full, self.keys, strict=True)):
            if full:
                now[i * self.size : (i + 1) * self.size] |= np.bitwise_or.reduce(blocks[sorted(full)], axis=0)
            for q, k in parts:
                begins = np.flatnonzero(np.diff(q, prepend=-1))
                now[q[begins]] |= np.bitwise_or.reduceat(heard[k], begins, axis=0)
        return now


def _exact(layers: list[_Layer], length: int) -> Reach | None:
    looks_ahead = any(layer.looks_ahead for layer in layers)
    wanted, heard = _wanted(length, looks_ahead), layers[0].alone(length)
    work = still = 0
    for number in range(1, DEEPEST + 1):
        if np.array_equal(heard & wanted, wanted):
            return Reach(number, looks_ahead)
        layer = layers[number % len(layers)]
        work += layer.pairs * heard.shape[1]
        if work > WORK:
            return None
        now = layer.after(heard)
        still = still + 1 if np.array_equal(now, heard) else 0
        if still == len(layers):
            return Reach(None, looks_ahead)
        heard = now
    return Reach(None, looks_ahead, is_beyond=True)


def _wanted(length: int, looks_ahead: bool) -> np.ndarray:
    """What each token may hear of, `[n, W]`: every token, or those up to itself."""
    packed = np.empty((length, -(-length // 64)), dtype=np.uint64)
    place, rows = np.arange(packed.shape[1] * 64), 1024
    for first in range(0, length, rows):
        token = np.arange(first, min(first + rows, length))[:, None]
        kept = (place < length) & (looks_ahead | (place <= token))
        packed[first : first + rows] = np.packbits(kept, axis=1, bitorder="little").view(np.uint64)
    return packed


def _on_blocks(plans: Sequence[BlockPlan]) -> Reach:
    # blocks of the plan, joined until the matrix is small
    join = -(-plans[0].q_blocks // FIELD_BLOCKS)
    steps = [_adjacency(plan, join) for plan in plans]
    side, unit = steps[0].shape[0], join * plans[0].block_size
    looks_ahead = any(bool(step.triu(1).any()) for step in steps)
    wanted = torch.ones(side, side, dtype=torch.bool)
    wanted = wanted if looks_ahead else wanted.tril()
    heard, still = torch.eye(side, dtype=torch.bool), 0
    for number in range(DEEPEST):
        now = heard | ((steps[number % len(steps)].float() @ heard.float()) > 0)
        if bool((now | ~wanted).all()):
            return Reach(number + 1, looks_ahead, unit)
        still = still + 1 if bool((now == heard).all()) else 0
        if still == len(steps):
            return Reach(None, looks_ahead, unit)
        heard = now
    return Reach(None, looks_ahead, unit, is_beyond=True)


def _adjacency(plan: BlockPlan, join: int) -> torch.Tensor:
    """Who hears whom in one layer, block by block, heads together."""
    side = -(-plan.q_blocks // join)
    counts = plan.row_offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts)), counts) % plan.q_blocks
    step = torch.zeros(side, side, dtype=torch.bool)
    step[row // join, plan.columns.long() // join] = True
    return step
