"""A learned logit per head in the denominator: as one more key without a value, on every backend, forward and backward."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.attention.merge import with_sink
from sparse_hf.pattern import Pattern


@pytest.mark.parametrize("backend", ["reference", "blockwise", "auto"])
@pytest.mark.parametrize("keys", [63, 257])
def test_a_sink_is_a_key_without_a_value(backend, keys):
    torch.manual_seed(0)
    leaves = [torch.randn(2, heads, keys, 16, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)]
    sinks = torch.randn(4, dtype=torch.float64).requires_grad_()
    text, chosen = "(window(20, 0) | first(2)) & causal()", torch.randn(2, 4, keys, 16, dtype=torch.float64)
    out, lse = sparse_attention(*leaves, text, backend=backend, return_lse=True)
    found = torch.autograd.grad(with_sink(out, lse, sinks), (*leaves, sinks), chosen)

    q, k, v = leaves
    place = torch.arange(keys)
    held = Pattern.parse(text).allows(place[:, None], place)
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~held, -torch.inf)
    more = torch.cat([scores, sinks[:, None, None].expand(2, 4, keys, 1)], -1)
    wanted = more.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(with_sink(out, lse, sinks), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (*leaves, sinks), chosen))


def test_a_row_that_sees_nothing_stays_zero():
    out, lse = torch.zeros(1, 1, 2, 4), torch.tensor([[[-torch.inf, 0.0]]]).requires_grad_()
    sinks = torch.zeros(1).requires_grad_()
    found = with_sink(out + 1, lse, sinks)
    assert found[0, 0, :, 0].tolist() == [0, 0.5]
    found.sum().backward()
    assert sinks.grad is not None and sinks.grad.isfinite().all()
