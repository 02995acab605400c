"""`choose` against sorting all scores."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.attention.chosen import DotScores, IndexerScores, Limits, choose, selection
from sparse_hf.testing import AllocationInterceptor
from tests.attention.exactness import DEVICE
from tests.crosses import sampled


def brute_force(scores, allowed, count):
    """Query by query, one key after the other: the highest score, of equal ones the lower key."""
    found = torch.full((*scores.shape[:3], min(count, scores.shape[3])), -1, dtype=torch.int32)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        row, may = scores[tuple(at)].tolist(), allowed[tuple(at)].tolist()
        best = sorted((key for key in range(len(row)) if may[key]), key=lambda key: (-row[key], key))
        best = sorted(best[:count])
        found[tuple(at)][: len(best)] = torch.tensor(best, dtype=torch.int32)
    return found


class Table:
    """Scores that are all there."""

    numbers_per_score = 1

    def __init__(self, table):
        self.table = table

    shape = property(lambda self: tuple(self.table.shape))
    device = property(lambda self: self.table.device)

    def scores(self, queries, keys):
        return self.table[:, :, queries, keys]


@pytest.mark.parametrize("count", [1, 7, 60, 100])
@pytest.mark.parametrize("kind", ["normal", "ties", "below zero"])
def test_equals_brute_force(kind, count, monkeypatch):
    monkeypatch.setattr("sparse_hf.attention.chosen.best_keys.KEYS", 16)
    monkeypatch.setattr("sparse_hf.attention.chosen.best_keys.MAX_SCORES", 600)
    scores = torch.randn(2, 2, 20, 60)
    scores = scores.round() * 0.5 if kind == "ties" else -scores.abs() if kind == "below zero" else scores
    allowed = torch.ones_like(scores, dtype=torch.bool)
    assert torch.equal(choose(Table(scores), count), brute_force(scores, allowed, count))


def test_limits(monkeypatch):
    monkeypatch.setattr("sparse_hf.attention.chosen.best_keys.KEYS", 16)
    scores = torch.randn(2, 1, 30, 50).round()
    start, end = torch.randint(0, 20, (2, 30)), torch.randint(10, 50, (2, 30))
    query, key = torch.arange(30)[:, None], torch.arange(50)
    allowed = (key <= query + 20) & (key >= start[:, None, :, None]) & (key < end[:, None, :, None])
    allowed = allowed & ((query + key) % 3 > 0)
    limits = Limits(start, end, 20, lambda q, k: (q + k) % 3 > 0)
    assert torch.equal(choose(Table(scores), 9, limits), brute_force(scores, allowed, 9))
    for offset in (-8, -1, 0, 30, 400):
        allowed = (key * 8 <= query + offset).expand_as(scores)
        assert torch.equal(choose(Table(scores), 9, Limits(q_offset=offset, size=8)), brute_force(scores, allowed, 9))


def test_what_is_never_chosen():
    scores = torch.randn(1, 1, 4, 6)
    scores[0, 0, 0] = -torch.inf
    scores[0, 0, 1, 2:] = -torch.inf
    assert choose(Table(scores), 5)[0, 0, :2].tolist() == [[-1] * 5, [0, 1, -1, -1, -1]]
    assert choose(Table(torch.randn(1, 1, 3, 0)), 5).shape == (1, 1, 3, 0)


def test_zeros_of_either_sign_are_equal():
    scores = torch.tensor([0.0, -0.0, 0.0, -1.0]).expand(1, 1, 1, 4)
    assert choose(Table(-scores), 2)[0, 0, 0].tolist() == [0, 3]
    assert choose(Table(scores), 2)[0, 0, 0].tolist() == [0, 1]


@pytest.mark.cross
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("few", [0, 60])
@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize("kind", ["normal", "ties", "below zero", "two keys"])
def test_kernels_equal_brute_force(kind, count, few, monkeypatch):
    monkeypatch.setattr(selection, "FEW_KEYS", few)
    monkeypatch.setattr(selection, "BLOCK", 16)
    monkeypatch.setattr(selection, "MAX_SCORES", 600)
    scores = torch.randn(2, 2, 4, 60)
    scores = scores.round() * 0.5 if kind == "ties" else -scores.abs() if kind == "below zero" else scores
    if kind == "two keys":
        scores[..., 2:] = -torch.inf
    query, key = torch.arange(4)[:, None], torch.arange(60)
    for limits, allowed in (
        (Limits(), torch.ones(4, 60, dtype=torch.bool)),
        (Limits(q_offset=20), key <= query + 20),
        (Limits(q_offset=30, size=8), key * 8 <= query + 30),
        (Limits(q_offset=-1, size=2), key * 2 <= query - 1),
        (Limits(q_offset=-1, allows=lambda q, k: (q + k) % 3 > 0), (key < query) & ((query + key) % 3 > 0)),
    ):
        wanted = brute_force(scores, allowed.expand_as(scores) & (scores > -torch.inf), count)
        assert torch.equal(choose(Table(scores.to(DEVICE)), count, limits).cpu(), wanted)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", sampled([torch.float16], [torch.float32, torch.float16]))
def test_kernels_of_an_indexer(dtype, monkeypatch):
    for name, value in (("TILE_QUERIES", 16), ("TILE_KEYS", 16), ("MAX_SCORES", 2 * 20 * 37)):
        monkeypatch.setattr(selection, name, value)
    query, key = torch.randn(2, 35, 3, 24).to(dtype), torch.randn(2, 37, 24).to(dtype)
    weights = torch.randn(2, 35, 3)
    scorer = IndexerScores(*(t.to(DEVICE) for t in (query, key, weights)), 0.5)
    exact = IndexerScores(query.double(), key.double(), weights.double(), 0.5).scores(slice(0, 35), slice(0, 37))
    found = selection.indexer_scores(scorer, slice(0, 35), None).cpu()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    for limits, allowed in (
        (Limits(q_offset=2), torch.ones(35, 37, dtype=torch.bool).tril(2)),
        (Limits(), torch.ones(35, 37, dtype=torch.bool)),
    ):
        wanted = brute_force(found, allowed.expand_as(found), 5)
        assert torch.equal(choose(scorer, 5, limits).cpu(), wanted)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_kernels_of_products(dtypes, monkeypatch):
    for name, value in (
        ("PRODUCT_QUERIES", 16),
        ("PRODUCT_KEYS", 16),
        ("PRODUCT_DIM", 16),
        ("MAX_SCORES", 2 * 4 * 20 * 37),
    ):
        monkeypatch.setattr(selection, name, value)
    query, key = (torch.randn(2, h, n, 24).to(dtype) for h, n, dtype in ((4, 35, dtypes[0]), (2, 37, dtypes[1])))
    scorer = DotScores(query.to(DEVICE), key.to(DEVICE))
    exact = DotScores(query.double(), key.double()).scores(slice(0, 35), slice(0, 37))
    found = selection.dot_scores(scorer, slice(0, 35), None).cpu()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    q, k = torch.arange(35)[:, None], torch.arange(37)
    for limits, allowed in (
        (Limits(), torch.ones(35, 37, dtype=torch.bool)),
        (Limits(q_offset=2), k <= q + 2),
        (Limits(q_offset=-20, size=8, allows=lambda q, k: (q + k) % 3 > 0), (8 * k <= q - 20) & ((q + k) % 3 > 0)),
    ):
        assert torch.equal(choose(scorer, 5, limits).cpu(), brute_force(found, allowed.expand_as(found), 5))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2], ids=str
)
def test_products_on_a_gpu(dtypes):
    query, key = (torch.randn(2, h, n, 200).to(dtype) for h, n, dtype in ((8, 300, dtypes[0]), (2, 700, dtypes[1])))
    exact = DotScores(query.double(), key.double()).scores(slice(0, 300), slice(0, 700))
    found = selection.dot_scores(DotScores(query.cuda(), key.cuda()), slice(0, 300), None)
    # as exact as products in float32
    assert float((found.cpu().double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_selects_on_a_gpu_what_a_cpu_does(kind):
    scores = torch.randn(2, 1, 300, 9000)
    scores = (scores * 4).round() if kind == "ties" else scores
    for limits in (Limits(), Limits(q_offset=8700), Limits(q_offset=-3)):
        wanted = choose(Table(scores), 2048, limits)
        assert torch.equal(choose(Table(scores.cuda()), 2048, limits).cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scores_of_an_indexer_on_a_gpu(dtype):
    query, key = torch.randn(2, 300, 64, 128).to(dtype), torch.randn(2, 700, 128).to(dtype)
    weights = torch.randn(2, 300, 64)
    exact = IndexerScores(query.double(), key.double(), weights.double(), 0.1).scores(slice(0, 300), slice(0, 700))
    found = selection.indexer_scores(IndexerScores(query.cuda(), key.cuda(), weights.cuda(), 0.1), slice(0, 300), None)
    assert float((found.cpu().double() - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_a_count_that_is_none_is_told(count):
    with pytest.raises(ValueError, match="it must be a whole number of at least 1"):
        choose(Table(torch.zeros(1, 1, 2, 2)), count)


def test_products():
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8)
    wanted = query @ key.repeat_interleave(2, 1).mT
    torch.testing.assert_close(DotScores(query, key).scores(slice(2, 7), slice(3, 12)), wanted[:, :, 2:7, 3:12])


def test_indexer():
    query, key, weights = torch.randn(2, 9, 3, 8), torch.randn(2, 12, 8), torch.randn(2, 9, 3)
    scorer = IndexerScores(query, key, weights, 0.5)
    wanted = torch.zeros(2, 1, 9, 12)
    for head in range(3):
        wanted[:, 0] += weights[..., head, None] * (query[:, :, head] @ key.mT * 0.5).relu()
    torch.testing.assert_close(scorer.scores(slice(0, 9), slice(0, 12)), wanted)
    causal = torch.ones(9, 12, dtype=torch.bool).tril(3)
    assert torch.equal(choose(scorer, 4, Limits(q_offset=3)), brute_force(wanted, causal.expand(2, 1, -1, -1), 4))


def test_no_tensor_has_two_lengths():
    length = 16_384
    scorer = IndexerScores(torch.randn(1, length, 2, 4), torch.randn(1, length, 4), torch.randn(1, length, 2))
    with AllocationInterceptor(length) as seen:
        choose(scorer, 16, Limits(q_offset=0))
    assert not seen.quadratic
