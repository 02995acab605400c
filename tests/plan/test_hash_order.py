"""Tiles of chunks, in the order of positions and of buckets."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.plan.hash_order import Chunking, hash_vectors, plan_chunks
from tests import oracle


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("left", "right"), [(1, 0), (0, 1), (1, 1), (2, 0)])
@pytest.mark.parametrize("length", [60, 64, 90])
def test_chunks_of_positions_are_a_ring(length, left, right, is_causal):
    chunking = Chunking(16, left, right, 16, 0)
    plan = plan_chunks(
        None, None, (2, 1, length), chunking, is_causal=is_causal, sees_itself=True, device=torch.device("cpu")
    )
    mask = oracle.dense_mask(f"ring(16, {left}, {right})", length, length)[:, 0]
    if is_causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(plan.counts(length, length), mask.expand(2, -1, -1).long())


@pytest.mark.parametrize("sees_itself", [False, True])
def test_chunks_of_buckets_follow_the_sorted_text(sees_itself):
    length, size, rounds = 48, 8, 3
    buckets = torch.randint(4, (1, 2, rounds, length), generator=torch.Generator().manual_seed(0))
    chunking = Chunking(size, 1, 0, size, 0)
    plan = plan_chunks(
        buckets, None, (1, 2, length), chunking, is_causal=False, sees_itself=sees_itself, device=torch.device("cpu")
    )
    counts = torch.zeros(2, length, length, dtype=torch.long)
    for head in range(2):
        # all rounds stand in one ring
        order = [sorted(range(length), key=lambda x, own=own: (own[x], x)) for own in buckets[0, head].tolist()]
        ring = [order[r][i : i + size] for r in range(rounds) for i in range(0, length, size)]
        for number, chunk in enumerate(ring):
            for q in chunk:
                for k in (*ring[number - 1], *chunk):
                    counts[head, q, k] += sees_itself or q != k
    assert torch.equal(plan.counts(length, length), counts)


@pytest.mark.parametrize("buckets", [8, (4, 6)])
def test_hashing_in_pieces_changes_nothing(buckets, monkeypatch):
    factors = (buckets,) if isinstance(buckets, int) else buckets
    vectors, rotations = torch.randn(2, 3, 50, 16), torch.randn(3, 16, 2, sum(factors) // 2)
    right = hash_vectors(vectors, rotations, buckets)
    assert right.shape == (2, 3, 2, 50) and int(right.max()) < torch.tensor(factors).prod()
    monkeypatch.setattr("sparse_hf.plan.hash_order.HASH_NUMBERS_ON_CPU", 1)
    assert torch.equal(hash_vectors(vectors, rotations, buckets), right)
