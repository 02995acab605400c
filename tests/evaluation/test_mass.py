"""What patterns keep of attention weights equals a count by brute force, and is never computed n x n."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import Pattern, build_plan
from sparse_hf.attention import content_weights, held_pairs
from sparse_hf.attention.backend import AttentionCall
from sparse_hf.attention.dropout import NO_DROPOUT
from sparse_hf.attention.scoring import Scoring
from sparse_hf.evaluation import mass
from sparse_hf.evaluation.mass import Scores, kept_mass, ranges
from sparse_hf.plan import NOTHING
from sparse_hf.testing import AllocationInterceptor
from tests.oracle import dense_mask

HEADS, GROUPS, DIM = 4, 2, 8
PATTERNS = (
    "window(20, 0) & window(None, 0)",
    "(window(15, 15) | first(2)) & window(None, None)",
    "stride(7) | window(3, 3)",
)


def tensors(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(HEADS, length, DIM), torch.randn(GROUPS, length, DIM)


def brute_force(q, k, allowed, scale: float, softcap=None, sink=None) -> torch.Tensor:
    """Weights `[H, n, n]` in float64, all at once."""
    k = k.repeat_interleave(HEADS // GROUPS, 0)
    scores = q.double() @ k.double().mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sink is None:
        return scores.softmax(-1)
    return torch.cat((scores, sink.double()[:, None, None].expand(-1, scores.shape[1], 1)), -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 63, 100, 257])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_kept_mass_is_that_of_the_whole_matrix(length, is_causal, softcap):
    q, k = tensors(length)
    past = " & window(None, 0)" if is_causal else ""
    texts = [f"({pattern}){past}" for pattern in PATTERNS]
    own = f"window(None, None){past}"
    found = kept_mass(
        q, k, Scores(0.3, softcap), build_plan(own, length), [build_plan(text, length) for text in texts], is_causal
    )
    weights = brute_force(q, k, dense_mask(own, length, length)[0], 0.3, softcap)
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    for e, (first, last) in enumerate(ranges(length)):
        near = weights * ((distance >= first) & (distance <= last))
        torch.testing.assert_close(found.dense[:, e], near.sum((1, 2)), rtol=1e-5, atol=1e-5)
        for p, text in enumerate(texts):
            kept = (near * dense_mask(text, length, length)[0]).sum((1, 2))
            torch.testing.assert_close(found.kept[p, :, e], kept, rtol=1e-5, atol=1e-5)
    for p, text in enumerate(texts):
        gone = (weights * ~dense_mask(text, length, length)[0]).sum((0, 1))
        torch.testing.assert_close(found.lost[p], gone, rtol=1e-4, atol=1e-5)


def test_wider_strips_change_nothing(monkeypatch):
    q, k = tensors(257)
    plans = [build_plan(text, 257) for text in ("window(9, 0)", "stride(4) & window(None, 0)")]
    given = q, k, Scores(0.5), build_plan("window(None, 0)", 257), plans, True
    narrow = kept_mass(*given)
    monkeypatch.setattr(mass, "strip_of", lambda q, plans: 200)
    wide = kept_mass(*given)
    for name in ("dense", "kept", "lost"):
        torch.testing.assert_close(getattr(wide, name), getattr(narrow, name), rtol=1e-5, atol=1e-6)


def test_kept_and_lost_are_one_together():
    q, k = tensors(150)
    found = kept_mass(
        q, k, Scores(0.5), build_plan("window(None, 0)", 150), [build_plan("window(9, 0) | first(1)", 150)], True
    )
    whole = found.kept[0].sum() + found.lost[0].sum()
    torch.testing.assert_close(whole, torch.tensor(150.0 * HEADS, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.dense.sum(-1), torch.full((HEADS,), 150.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_learned_logit_takes_its_share():
    q, k = tensors(70)
    sink = torch.randn(HEADS)
    plan = build_plan("window(None, 0)", 70)
    found = kept_mass(q, k, Scores(0.5, sink=sink), plan, [plan], True)
    weights = brute_force(q, k, dense_mask("window(None, 0)", 70, 70)[0], 0.5, sink=sink)
    torch.testing.assert_close(found.dense.sum(-1), weights.sum((1, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.dense.sum(-1) + found.sink, torch.full((HEADS,), 70.0).double(), rtol=1e-5, atol=0)


def test_heads_have_patterns_of_their_own():
    q, k = tensors(90)
    text = "per_head(window(5, 0), window(40, 0), first(3) & window(None, 0), window(0, 0))"
    plans = [build_plan(text, 90), build_plan("window(11, 0)", 90)]
    found = kept_mass(q, k, Scores(0.4), build_plan("window(None, 0)", 90), plans, True)
    weights = brute_force(q, k, dense_mask("window(None, 0)", 90, 90)[0], 0.4)
    for p, one in enumerate((text, "window(11, 0)")):
        mask = dense_mask(one, 90, 90)[0]
        torch.testing.assert_close(found.kept[p].sum(-1), (weights * mask).sum((1, 2)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.lost[p], (weights * ~mask).sum((0, 1)), rtol=1e-4, atol=1e-5)


CHOICES = (
    "(window(7, 0) | first(2) | topk(9)) & window(None, 0)",
    "(window(7, 0) | topk_blocks(3, 8, 'bounds', 8)) & window(None, 0)",
    "(window(7, 0) | topk_blocks(2, 16, 'mean')) & window(None, 0)",
    "(window(7, 0) | vertical_slash(4, 3)) & window(None, 0)",
    "(window(7, 0) | threshold(0.5)) & window(None, 0)",
    "(window(7, 0) | lsh(8, 2, 16)) & window(None, 0)",
)


@pytest.mark.parametrize("text", CHOICES)
def test_what_is_chosen_is_what_attention_computes(text, monkeypatch):
    """Against the weights of the reference backend under the same choice, beside a pattern of positions."""
    length = 257
    q, k = tensors(length)
    monkeypatch.setattr(mass, "strip_of", lambda q, plans: 37)
    pairs = [held_pairs(q[None], k[None], text, 2.0), build_plan("window(11, 0)", length)]
    found = kept_mass(q, k, Scores(2.0), build_plan("window(None, 0)", length), pairs, True)
    call = AttentionCall(q[None], k[None], k[None], Pattern.parse(text), 0, Scoring(2.0), NO_DROPOUT, NOTHING)
    held = content_weights(call)[2][0] > 0
    weights = brute_force(q, k, dense_mask("window(None, 0)", length, length)[0], 2.0)
    assert 0 < held.sum() < HEADS * length * (length + 1) / 2
    for p, pairs in enumerate((held, dense_mask("window(11, 0)", length, length)[0])):
        torch.testing.assert_close(found.kept[p].sum(-1), (weights * pairs).sum((1, 2)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.lost[p], (weights * ~pairs).sum((0, 1)), rtol=1e-4, atol=1e-5)


def test_what_asks_for_more_than_queries_and_keys_is_refused():
    q, k = tensors(30)
    with pytest.raises(NotImplementedError, match=r"topk\(4, 'indexer'\)[^:]*: .*chooses by the scores of an indexer"):
        held_pairs(q[None], k[None], "topk(4, 'indexer') & window(None, 0)", 0.4)


def test_a_query_without_keys_has_no_weight():
    q, k = tensors(40)
    found = kept_mass(
        q, k, Scores(1.0), build_plan("first(1) & window(3, 0)", 40), [build_plan("window(9, 0)", 40)], True
    )
    assert found.dense.sum() == pytest.approx(4 * HEADS) and bool(torch.isfinite(found.kept).all())


def test_nothing_is_n_by_n():
    q, k = tensors(1999)
    with AllocationInterceptor(1999, block_sizes=()) as seen:
        kept_mass(q, k, Scores(0.5), build_plan("window(None, 0)", 1999), [build_plan("window(99, 0)", 1999)], True)
    assert not seen.quadratic
    # a strip of queries beside all keys, for all heads
    assert seen.largest <= HEADS * 64 * 1999


def test_ranges_of_distances_hold_every_distance_once():
    for length in (1, 2, 3, 8, 100):
        assert [d for first, last in ranges(length) for d in range(first, last + 1)] == list(range(length))
