"""Texts that a pattern leaves whole, which "auto" gives to PyTorch's own dense attention, against attention in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.attention import route
from sparse_hf.attention.dispatch import DENSE
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.exactness import call_of, tensors, without_lse

LENGTH = 200


@pytest.mark.parametrize("shape", [(4, 4, 32), (4, 2, 64), (4, 1, 80)])
@pytest.mark.parametrize("pattern", ["window(None, 0)", "window(199, 0)", "window(None, None)", "sliding_window(4096)"])
def test_exact(pattern, shape):
    mask = oracle.dense_mask(pattern, LENGTH, LENGTH)
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        qkv = tensors(shape, LENGTH, LENGTH, dtype)
        assert route(call_of(*qkv, pattern, wants_lse=False), "auto") is DENSE
        got = oracle.gradients(without_lse(lambda q, k, v: sparse_attention(q, k, v, pattern)), *qkv)
        exact = oracle.gradients(
            without_lse(lambda q, k, v: oracle.attention(q, k, v, mask)[0]), *(t.double() for t in qkv)
        )
        for one, other in zip(got, exact, strict=True):
            torch.testing.assert_close(one.double(), other, atol=near, rtol=near)


@pytest.mark.parametrize("pattern", ["window(None, 0)", "full()"])
def test_no_tensor_has_two_lengths(pattern):
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 16), 1999, 1999, torch.float32))
    assert route(call_of(q, k, v, pattern, wants_lse=False), "auto") is DENSE
    with AllocationInterceptor(1999) as seen:
        sparse_attention(q, k, v, pattern).sum().backward()
    assert not seen.quadratic


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pattern": "window(9, 0)"}, "leaves pairs out"),
        ({"shape": (4, 4, 264)}, "head dims make n x n scores"),
        ({"wants_lse": True}, "gives no lse"),
    ],
)
def test_what_it_cannot_run_has_a_reason(change, reason):
    shape, pattern = change.pop("shape", (4, 2, 32)), change.pop("pattern", "full()")
    call = call_of(*tensors(shape, LENGTH, LENGTH, torch.float32), pattern, **{"wants_lse": False, **change})
    assert reason in DENSE.why_not(call)
