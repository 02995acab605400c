"""Dropout is one mask on every backend, drawn at its rate."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention.dropout import kept
from tests import oracle
from tests.attention.exactness import leaves


@pytest.mark.parametrize("pattern", ["window(40, 7) | first(2)", "window(40, 7) | marked()"])
def test_dropout_is_the_same_mask_on_every_backend_and_exact(pattern):
    q, k, v = leaves((2, 4, 200, 16), (2, 2, 200, 16), (2, 2, 200, 16), dtype=torch.float64)
    rate = 0.3
    marks = torch.rand(2, 200) < 0.1
    plan = build_plan(pattern, 200, marks=marks)

    def run(backend):
        torch.manual_seed(5)
        out, lse = sparse_attention(q, k, v, plan, dropout=rate, backend=backend, return_lse=True)
        return out, lse, *torch.autograd.grad((out * torch.arange(16)).sum() + lse.sum(), (q, k, v))

    torch.manual_seed(5)
    seed = torch.randint(0, 0xFFFFFFFF, (), dtype=torch.int64)
    factor = kept(seed, torch.empty(2, 4, 200, 200), rate) / (1 - rate)
    mask = oracle.dense_mask(pattern, 200, 200, marks=marks)
    out, lse = oracle.attention(q, k, v, mask, factor)
    exact = out, lse, *torch.autograd.grad((out * torch.arange(16)).sum() + lse.sum(), (q, k, v))
    for backend in ("reference", "blockwise"):
        for got, wanted in zip(run(backend), exact, strict=True):
            torch.testing.assert_close(got, wanted)
    assert not torch.equal(sparse_attention(q, k, v, plan, dropout=rate), sparse_attention(q, k, v, plan, dropout=rate))


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    for rate in (0.1, 0.5):
        flags = kept(torch.tensor(7), torch.empty(2, 4, 300, 300), rate)
        # five standard deviations of a binomial
        assert abs(flags.float().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / flags.numel()) ** 0.5
        for a, b in ((flags[0], flags[1]), (flags[:, 0], flags[:, 1]), (flags[..., 1:], flags[..., :-1])):
            assert abs((a == b).float().mean() - ((1 - rate) ** 2 + rate**2)) < 5e-3
    q, k, v = (t.detach() for t in leaves(*[(1, 1, 64, 8)] * 3))
    mean = torch.stack([sparse_attention(q, k, v, "window(9, 9)", dropout=0.2) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, sparse_attention(q, k, v, "window(9, 9)"), atol=0.12, rtol=0)
