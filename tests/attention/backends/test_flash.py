"""`fa` without a GPU: the merge and its gradients in float64, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention.backends.flash import backend as fa
from sparse_hf.attention.backends.flash import window_kernels as flash
from sparse_hf.attention.scoring import Scoring
from sparse_hf.plan import split
from tests import oracle
from tests.plan.test_window_tables import PATTERNS, plan_of
from tests.table import LENGTHS, SCENARIOS, causal_form


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
