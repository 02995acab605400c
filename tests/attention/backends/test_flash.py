"""`fa` without a GPU: what a plan splits into, the merge and its gradients in float64, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf import Pattern, build_plan, sparse_attention
from sparse_hf.attention.backends.flash import backend as fa
from sparse_hf.attention.backends.flash import window_kernels as flash
from sparse_hf.attention.scoring import Scoring
from sparse_hf.plan import Split, split
from tests import oracle
from tests.table import LENGTHS, SCENARIOS, causal_form, scenario

PATTERNS = [
    "window(None, None)",
    "window(20, 20)",
    "window(40, 0)",
    "window(None, 3)",
    "first(3)",
    "window(16, 16) | first(2)",
    "window(30, 5) | marked()",
    "first(2) | marked() | window(9, 0)",
    "window(30, 5) | marked_keys()",
    "first(2) & window(None, 0) | marked_keys() & window(None, 0) | window(9, 0)",
    "window(20, 20) & window(3, None) | window(1, 7) | first(5)",
    "longformer(attention_window=32)",
    "streaming(window=32, sinks=4)",
    "first(4) & window(30, 0) | window(5, 0)",
]


def plan_of(pattern: str, length: int, case: str, batch: int = 2):
    data = scenario(case, length, batch)
    q_len = data.pop("q_len")
    plan = build_plan(
        pattern, q_len, length, key_padding_mask=data["real"], segment_ids=data["documents"], marks=data["marks"]
    )
    return plan, q_len, data


def pairs_of(found: Split) -> torch.Tensor:
    """How often the three parts hold each pair, `[B, Q, K]`, from the tables alone."""
    counts = torch.zeros(found.batch, found.q_len, found.kv_len, dtype=torch.long)
    rows = set(found.rows.tolist())
    window, clip = found.shape.window, found.shape.clip
    for (b, q0, q1, k0, k1), columns in zip(found.sequences.tolist(), found.columns.tolist(), strict=True):
        for i in range(q0, q1):
            if b * found.q_len + i in rows:
                counts[b, i, k0:k1] += 1
                continue
            x = torch.tensor(i + found.q_offset)
            keys = torch.arange(k0, k1)
            # kernels take the last query to stand at the last key
            assert window is None or q1 + found.q_offset == k1
            inside = torch.zeros_like(keys, dtype=torch.bool) if window is None else window.allows(x, keys)
            counts[b, i, k0:k1] += inside
            for key in columns:
                if key >= 0 and clip.allows(x, torch.tensor(key)) and not inside[key - k0]:
                    counts[b, i, key] += 1
    return counts


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_parts_hold_each_pair_once(pattern, case):
    for text in (pattern, causal_form(pattern)):
        plan, _, _ = plan_of(text, 63, case)
        found = split(plan, 2)
        if isinstance(found, str):
            # rows of marked queries that see the past only
            assert "marked" in text and "must see everything" in found
            continue
        assert torch.equal(pairs_of(found), plan.to_dense()[:, 0].expand(2, -1, -1).long())


windows = st.builds("window({}, {})".format, *[st.none() | st.integers(0, 12)] * 2)
globals_ = st.sampled_from(
    ["first(0)", "first(1)", "first(3)", "first(30)", "marked()", "marked_keys()", "marked_queries()", "last(2)"]
)
leaves = st.one_of(windows, globals_)
patterns = st.recursive(
    leaves, lambda inner: st.builds("({}) {} ({})".format, inner, st.sampled_from("|&"), inner), max_leaves=5
)


@settings(max_examples=150, deadline=None)
@given(text=patterns, case=st.sampled_from(SCENARIOS), length=st.integers(1, 24))
def test_any_pattern_is_split_exactly_or_refused(text, case, length):
    plan, _, _ = plan_of(str(Pattern.parse(text)), length, case)
    found = split(plan, 2)
    if isinstance(found, Split):
        assert torch.equal(pairs_of(found), plan.to_dense()[:, 0].expand(2, -1, -1).long())


class Plain:
    """A window kernel in plain PyTorch, with the interface of `flash.FA2`."""

    @staticmethod
    def _each(q, k, packed, window):
        """Query rows, key rows and mask of each sequence, of tensors with a batch dimension in front."""
        if packed is None:
            for b in range(q.shape[0]):
                yield b, slice(0, q.shape[1]), slice(0, k.shape[1]), Plain._mask(q.shape[1], k.shape[1], window)
            return
        cu_q, cu_k = packed.cu_q.tolist(), packed.cu_k.tolist()
        assert cu_q[-1] == q.shape[1] and cu_k[-1] == k.shape[1]
        for a, z, c, e in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            assert z - a <= packed.max_q and e - c <= packed.max_k
            yield 0, slice(a, z), slice(c, e), Plain._mask(z - a, e - c, window)

    @staticmethod
    def _mask(m, n, window):
        distance = torch.arange(n) - torch.arange(n - m, n)[:, None]
        left, right = (n + m if side is None else side for side in window)
        return (distance >= -left) & (distance <= right)

    @staticmethod
    def _scores(q, k, mask, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~mask, -torch.inf)

    @staticmethod
    def forward(q, k, v, packed, window, scale):
        # what kernels leave undefined is NaN here
        out, lse = torch.full_like(q, torch.nan), torch.full_like(q[..., 0], torch.nan)
        whole = [t[None] if packed is not None else t for t in (q, k, v, out, lse)]
        for b, rows, keys, mask in Plain._each(*whole[:2], packed, window):
            if rows.start == rows.stop or keys.start == keys.stop:
                continue
            scores = Plain._scores(whole[0][b, rows], whole[1][b, keys], mask, scale)
            values = whole[2][b, keys].repeat_interleave(q.shape[-2] // k.shape[-2], 1)
            whole[3][b, rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            whole[4][b, rows] = scores.logsumexp(-1).T
        return out, lse.transpose(-1, -2).contiguous()

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, grad_lse, packed, window, scale):
        grads = [torch.full_like(t, torch.nan) for t in (q, k, v)]
        lse, grad_lse = (None if t is None else t.transpose(-1, -2) for t in (lse, grad_lse))
        whole = [t if t is None or packed is None else t[None] for t in (grad_out, q, k, v, out, lse, grad_lse, *grads)]
        groups, repeats = k.shape[-2], q.shape[-2] // k.shape[-2]
        for b, rows, keys, mask in Plain._each(*whole[1:3], packed, window):
            do, query, o, row_lse = (whole[i][b, rows] for i in (0, 1, 4, 5))
            key, value = whole[2][b, keys], whole[3][b, keys].repeat_interleave(repeats, 1)
            weights = (Plain._scores(query, key, mask, scale) - row_lse.T[..., None]).exp()
            delta = (do * o).sum(-1) - (0 if grad_lse is None else whole[6][b, rows])
            change = weights * (torch.einsum("qhd,khd->hqk", do, value) - delta.T[..., None]) * scale
            if keys.start < keys.stop:
                whole[7][b, rows] = torch.einsum("hqk,khd->qhd", change, key.repeat_interleave(repeats, 1))
            # keys of a sequence without queries get zeros
            grad_k, grad_v = (
                torch.einsum("hqk,qhd->khd", w, t).unflatten(1, (groups, repeats)).sum(2)
                for w, t in ((change, query), (weights, do))
            )
            whole[8][b, keys], whole[9][b, keys] = grad_k, grad_v
        return tuple(grads)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(flash, "kernels", lambda q: Plain)


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_merge_and_its_gradients_are_exact(pattern, case, plain):
    index = PATTERNS.index(pattern) + SCENARIOS.index(case)
    for step, text in enumerate((pattern, causal_form(pattern))):
        length = LENGTHS[(index + step) % 4]
        plan, q_len, data = plan_of(text, length, case)
        if isinstance(split(plan, 2), str):
            continue
        generator = torch.Generator().manual_seed(index)
        q, k, v = (
            torch.randn(2, h, n, 8, generator=generator, dtype=torch.float64)
            for h, n in ((4, q_len), (2, length), (2, length))
        )
        mask = oracle.dense_mask(text, q_len, length, **data)
        exact = oracle.gradients(lambda *t, m=mask: oracle.attention(*t, m), q, k, v)
        ours = oracle.gradients(lambda *t, p=plan: fa.attend(*t, p, Scoring(8**-0.5), 0.0, None), q, k, v)
        for got, wanted in zip(ours, exact, strict=True):
            torch.testing.assert_close(got, wanted)


def test_the_gradient_of_the_output_alone_is_exact(plain):
    q, k, v = (torch.randn(1, 2, 50, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    plan = build_plan("window(5, 5) | first(2)", 50)
    mask = oracle.dense_mask("window(5, 5) | first(2)", 50, 50)
    ours = torch.autograd.grad(fa.attend(q, k, v, plan, Scoring(8**-0.5), 0.0, None)[0].square().sum(), (q, k, v))
    exact = torch.autograd.grad(oracle.attention(q, k, v, mask)[0].square().sum(), (q, k, v))
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("window(3, 3) & stride(2)", r"stride\(2\) is neither a window nor global tokens"),
        ("window(3, 3) | chunk(5)", r"chunk\(5.*\) is neither"),
        ("bigbird(block_size=16)", "is neither a window nor global tokens"),
        ("first(3) & marked()", r"first\(3\) & marked\(\) is neither"),
        ("first(2) & window(4, 0) | marked()", "global tokens have different reaches"),
        ("first(2) & window(9, 9)", r"see window\(9, 9\) only; they must see everything"),
        ("(window(3, 0) | marked()) & window(None, 0)", r"see window\(None, 0\) only"),
        ("window(3, 3) | marked_queries()", r"marked_queries\(\) is neither"),
        ("window(3, 3) | last(2)", r"last\(2.*\) is neither"),
        ("first(0)", "holds no pair"),
        ("per_head(window(1, 1), first(2))", "heads have patterns of their own"),
    ],
)
def test_a_plan_that_is_no_window_with_globals_says_why(pattern, message):
    marks = torch.arange(40)[None] % 7 == 0
    found = split(build_plan(pattern, 40, marks=marks), 1)
    assert isinstance(found, str)
    assert re.search(message, found), found


def test_queries_with_keys_ahead_in_reach_are_refused():
    assert "queries that are not the last" in split(build_plan("window(3, 3)", 10, 40, q_offset=5), 1)
    found = split(build_plan("window(3, 0) | first(2) & window(None, 0)", 10, 40, q_offset=5), 1)
    assert torch.equal(
        pairs_of(found),
        build_plan("window(3, 0) | first(2) & window(None, 0)", 10, 40, q_offset=5).to_dense()[:, 0].long(),
    )


def test_padding_inside_a_sequence_is_refused():
    real = torch.ones(1, 20, dtype=torch.bool)
    real[0, 7] = False
    assert split(build_plan("window(3, 0)", 20, key_padding_mask=real), 1) == "padding inside a sequence"


def test_a_mask_function_is_refused():
    plan = build_plan("window(3, 0)", 20, mask_function=lambda b, h, q, k: k <= q)
    assert "element by element" in split(plan, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "it needs a GPU and q is on cpu"),
        ({"dropout": 0.5}, "use backend='blockwise'"),
        ({"softcap": 5.0}, "without soft cap or relative bias; use backend='flex'"),
        ({"relative_bias": torch.zeros(2, 39)}, "without soft cap or relative bias"),
    ],
)
def test_what_it_cannot_run_is_refused_with_a_reason(change, message):
    q = torch.zeros(1, 2, 20, 8)
    with pytest.raises(NotImplementedError, match=message):
        sparse_attention(q, q, q, "window(3, 0)", backend="fa", **change)
