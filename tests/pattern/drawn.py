"""Random patterns for laws that hold for all of them. A new primitive is a row of `primitives`."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from sparse_hf import (
    BlockTable,
    Chunk,
    First,
    Fixed,
    Last,
    Marked,
    MarkedKeys,
    MarkedQueries,
    Outside,
    Pattern,
    RandomBlocks,
    Ring,
    Stride,
    Summary,
    Window,
    Window2d,
)
from sparse_hf.pattern.base import Marks

N = 40
Q, K = torch.arange(N)[:, None], torch.arange(N)[None, :]
MARKED = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.15
BOXES = 1200
small = st.integers(0, 12)
limit = st.none() | small
size = st.integers(1, 12)
primitives = st.one_of(
    st.builds(Window, limit, limit),
    st.builds(First, small),
    st.builds(Marked),
    st.builds(MarkedKeys),
    st.builds(MarkedQueries),
    st.builds(Stride, size),
    size.flatmap(lambda b: st.builds(Fixed, st.just(b), st.integers(0, b))),
    size.flatmap(lambda b: st.builds(Summary, st.just(b), st.integers(1, b))),
    st.builds(Chunk, size, small, small),
    st.builds(Ring, size, small, small),
    st.builds(Last, small, size),
    st.builds(Window2d, size, size, st.integers(0, 4), small),
    st.builds(RandomBlocks, st.integers(1, 4), size, st.integers(0, 2**40)),
    st.builds(BlockTable, size, st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=8).map(tuple)),
)
patterns = st.recursive(
    primitives,
    lambda p: st.builds(Pattern.__or__, p, p) | st.builds(Pattern.__and__, p, p) | st.builds(Outside, p),
    max_leaves=5,
)
law = settings(max_examples=100, derandomize=True, deadline=None)


def pairs(pattern: Pattern) -> torch.Tensor:
    allowed = pattern.allows(Q, K, Marks(MARKED[:, None], MARKED[None, :], N))
    assert allowed.shape == (N, N) and allowed.dtype == torch.bool
    return allowed


def states_and_truth(pattern: Pattern, seed: int):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, N, (4, BOXES), generator=generator)
    # half of the boxes are small, where EMPTY and FULL are common
    ends[1, : BOXES // 2] = (ends[0] + ends[1] % 4).clamp(max=N - 1)[: BOXES // 2]
    ends[3, : BOXES // 2] = (ends[2] + ends[3] % 4).clamp(max=N - 1)[: BOXES // 2]
    q0, q1, k0, k1 = *ends[:2].sort(0).values, *ends[2:].sort(0).values
    marks = torch.nn.functional.pad(MARKED.long().cumsum(0), (1, 0))
    of_range = [((marks[b + 1] - marks[a] > 0).int() + (marks[b + 1] - marks[a] == b - a + 1).int()).to(torch.int8)
                for a, b in ((q0, q1), (k0, k1))]  # fmt: skip
    sums = torch.nn.functional.pad(pairs(pattern).long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    held = sums[q1 + 1, k1 + 1] - sums[q0, k1 + 1] - sums[q1 + 1, k0] + sums[q0, k0]
    truth = torch.where(held == 0, 0, torch.where(held == (q1 - q0 + 1) * (k1 - k0 + 1), 2, 1))
    return pattern.blocks(q0, q1, k0, k1, Marks(*of_range, N)), truth
