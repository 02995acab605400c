"""A learned logit per head in the denominator: as one more key without a value, on every backend, forward and backward."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.attention.dispatch import BACKENDS
from sparse_hf.attention.merge import with_sink
from sparse_hf.pattern import Pattern
from tests.attention.exactness import DEVICE, ROUNDINGS


@pytest.mark.cross(("backend", "dtype"), ("keys", "dims"))
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("blockwise", torch.float64),
        ("auto", torch.float64),
        *((b, torch.float32) for b in BACKENDS),
    ],
)
@pytest.mark.parametrize(("keys", "dims"), [(63, (16, 16)), (257, (16, 16)), (63, (24, 16)), (100, (16, 40))])
def test_a_sink_is_a_key_without_a_value(backend, dtype, keys, dims):
    """With values as wide as keys, narrower and wider, as multi-head latent attention has them."""
    torch.manual_seed(0)
    sizes = ((4, dims[0]), (2, dims[0]), (2, dims[1]))
    leaves = [torch.randn(2, heads, keys, dim, dtype=dtype, device=DEVICE).requires_grad_() for heads, dim in sizes]
    sinks = torch.randn(4, dtype=dtype, device=DEVICE).requires_grad_()
    text, chosen = "(window(20, 0) | first(2)) & causal()", torch.randn(2, 4, keys, dims[1], dtype=dtype, device=DEVICE)
    try:
        out, lse = sparse_attention(*leaves, text, backend=backend, return_lse=True)
    except NotImplementedError as error:
        pytest.skip(str(error))
    found = with_sink(out, lse, sinks)
    grads = torch.autograd.grad(found, (*leaves, sinks), chosen)

    exact = [t.detach().double().requires_grad_() for t in (*leaves, sinks)]
    q, k, v, logits = exact
    place = torch.arange(keys, device=DEVICE)
    held = Pattern.parse(text).allows(place[:, None], place)
    scores = (q @ k.repeat_interleave(2, 1).mT * dims[0] ** -0.5).masked_fill(~held, -torch.inf)
    more = torch.cat([scores, logits[:, None, None].expand(2, 4, keys, 1)], -1)
    wanted = more.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    limit = {"atol": 20 * ROUNDINGS[dtype], "rtol": 20 * ROUNDINGS[dtype]}
    torch.testing.assert_close(found.double(), wanted, **limit)
    for one, other in zip(grads, torch.autograd.grad(wanted, exact, chosen.double()), strict=True):
        torch.testing.assert_close(one.double(), other, **limit)


def test_a_row_that_sees_nothing_stays_zero():
    out, lse = torch.zeros(1, 1, 2, 4), torch.tensor([[[-torch.inf, 0.0]]]).requires_grad_()
    sinks = torch.zeros(1).requires_grad_()
    found = with_sink(out + 1, lse, sinks)
    assert found[0, 0, :, 0].tolist() == [0, 0.5]
    found.sum().backward()
    assert sinks.grad is not None and sinks.grad.isfinite().all()
