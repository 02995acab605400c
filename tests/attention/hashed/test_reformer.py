"""Chunks in hash order: by Triton's kernels, by plain PyTorch and by their definition."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.attention import attend
from sparse_hf.attention.backend import AttentionCall
from sparse_hf.attention.backends.triton import walk
from sparse_hf.attention.dropout import NO_DROPOUT
from sparse_hf.attention.hashed import hash_order, kernels
from sparse_hf.attention.hashed.reformer import chunked_attention, chunked_weights
from sparse_hf.attention.scoring import Scoring
from sparse_hf.plan import NOTHING
from sparse_hf.plan.hash_order import Chunking, plan_chunks
from tests import oracle
from tests.attention.exactness import DEVICE, tensors
from tests.crosses import slow_but_for


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("trial", slow_but_for(range(4), range(12), range(2)))
def test_chunks_in_hash_order_are_those_of_plain_torch(trial, monkeypatch):
    generator = torch.Generator().manual_seed(trial)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    batch, heads, length, rounds = draw(1, 3), draw(1, 4), draw(20, 130), 1 + trial % 3
    size = (16, 32)[draw(0, 2)]
    chunking = Chunking(size, draw(0, 2), draw(0, 2), (size, 2 * size)[draw(0, 2)], draw(0, 2) * size)
    how = {"is_causal": bool(draw(0, 2)), "sees_itself": bool(draw(0, 2)), "dropout": 0.2 * (trial % 2), "scale": 0.3}
    how["buckets"] = torch.randint(6, (batch, heads, rounds, length), generator=generator).to(DEVICE) if trial else None
    if trial % 3:
        real = torch.arange(length) >= torch.randint(length // 2, (batch, 1), generator=generator)
        how["real"] = (real if trial % 2 else real.flip(1)).to(DEVICE)
    given = [torch.randn(batch, heads, length, 20, generator=generator).to(DEVICE) for _ in range(3)]

    def run(devices):
        monkeypatch.setattr(walk, "DEVICES", devices)
        torch.manual_seed(5)
        return oracle.gradients(lambda *t: chunked_attention(*t, chunking, **how), *given)

    for one, other in zip(run({DEVICE}), run(set()), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("interpreted")
def test_chunks_that_see_many_are_exact():
    q, k, v = tensors((1, 1, 16), 32, 32, torch.float32, DEVICE)
    chunking = Chunking(16, 140, 0, 16, 0)
    plan = plan_chunks(None, None, tuple(q.shape[:3]), chunking, is_causal=True, sees_itself=True, device=q.device)
    assert kernels.can_run(q, v, plan)
    call = AttentionCall(q, k, v, None, 0, Scoring(0.25), NO_DROPOUT, NOTHING, chosen_plan=plan)
    got, right = attend(call, hash_order.HashOrder()), hash_order.with_weights(call)
    for one, other in zip(got, right, strict=False):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def counted(buckets, real, chunking: Chunking, is_causal: bool, sees_itself: bool) -> torch.Tensor:
    """How often each query meets each key, `[N, N]`, of one row, from the definition: rounds side by side, then chunks."""
    rounds, length = buckets.shape
    counts = torch.zeros(length, length, dtype=torch.long)
    chunks = []
    for of_round in buckets:
        order = [x for x in sorted(range(length), key=lambda x: (int(of_round[x]), x)) if real[x]]
        chunks += [order[i : i + chunking.size] for i in range(0, len(order), chunking.size)]
    assert len(chunks) % rounds == 0
    for c, queries in enumerate(chunks):
        for step in range(-chunking.left, chunking.right + 1):
            for q in queries:
                for k in chunks[(c + step) % len(chunks)]:
                    seen = (k < q or (k == q and sees_itself)) if is_causal else (k != q or sees_itself)
                    counts[q, k] += seen
    return counts


@pytest.mark.cross
@pytest.mark.parametrize("backend", ["auto", "blockwise", "reference"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("is_causal", "sees_itself"), [(True, True), (True, False), (False, True), (False, False)])
def test_exact(is_causal, sees_itself, padded, backend):
    length, rounds, chunking = 48, 2, Chunking(16, 1, 0, 16, 0)
    q, k, v = tensors((3, 3, 16), length, length, torch.float64)
    buckets = torch.randint(5, (2, 3, rounds, length), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, length, dtype=torch.bool)
    if padded:
        # whole chunks, so that the definition above needs none that are half full
        real[0, :16] = False
    counts = torch.stack([
        torch.stack([counted(buckets[b, h], real[b], chunking, is_causal, sees_itself) for h in range(3)])
        for b in range(2)
    ])  # fmt: skip

    def defined(q, k, v):
        # a key that is met several times counts several times
        scores = (q @ k.mT) * 0.25 + counts.double().log()
        sees = (counts > 0).any(-1, keepdim=True)
        lse = torch.where(sees, scores, 0).logsumexp(-1)
        weights = torch.where(sees, (scores - lse[..., None]).exp(), 0)
        return weights @ v, lse.masked_fill(~sees[..., 0], -torch.inf)

    how = {"buckets": buckets, "real": real if padded else None, "is_causal": is_causal, "sees_itself": sees_itself}
    wanted = oracle.gradients(defined, q, k, v)
    found = oracle.gradients(lambda *t: chunked_attention(*t, chunking, **how, scale=0.25, backend=backend), q, k, v)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    weights = chunked_weights(q, k, chunking, **how, scale=0.25)
    torch.testing.assert_close(weights @ v, wanted[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["flex", "fa", "triton"])
def test_other_backends_are_refused(backend):
    q, k, v = tensors((2, 2, 16), 32, 32, torch.float32)
    with pytest.raises(NotImplementedError, match="cannot run chunks of hashed or ring order"):
        chunked_attention(q, k, v, Chunking(16, 1, 0, 16, 0), backend=backend)


def test_the_reference_drops_nothing():
    q, k, v = tensors((2, 2, 16), 32, 32, torch.float32)
    with pytest.raises(NotImplementedError, match="it drops no weights in hash order"):
        chunked_attention(q, k, v, Chunking(16, 1, 0, 16, 0), backend="reference", dropout=0.1)
