"""Windows over short texts, which "auto" gives to PyTorch's sliding FlashAttention on a GPU, against attention in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.attention import route
from sparse_hf.attention.backends.sdpa.window import HOST_BOUND_ELEMENTS, UNLIMITED, sides
from sparse_hf.attention.dispatch import SLIDING
from sparse_hf.pattern import Pattern
from sparse_hf.testing import AllocationInterceptor
from tests.attention.exactness import call_of, compare, tensors

WINDOWS = ("window(20, 0)", "window(5, 9)", "window(0, 0)", "window(None, 3)", "window(90, None)", "sliding_window(64)")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("window(20, 0)", (20, 0)),
        ("window(None, 3)", (UNLIMITED, 3)),
        ("window(20, 0) | window(5, 0)", (20, 0)),
        ("window(20, 20) & window(None, 0)", (20, 0)),
        ("window(20, 0) | first(1)", None),
        ("window(20, 0) | marked()", None),
        ("stride(4)", None),
        ("chunk(16)", None),
    ],
)
def test_the_sides_of_a_window(pattern, found):
    assert sides(Pattern.parse(pattern), 100) == found


def test_a_cpu_is_left_to_others():
    call = call_of(*tensors((4, 2, 32), 200, 200, torch.bfloat16), "window(9, 0)", wants_lse=False)
    assert "on GPUs of compute capability 8.0" in SLIDING.why_not(call) and not SLIDING.is_fastest(call)
    assert "no gradient of lse" in SLIDING.why_not(call_of(call.q, call.k, call.v, "window(9, 0)"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["plain", "last_queries"])
@pytest.mark.parametrize(("shape", "length"), [((4, 4, 64), 300), ((4, 2, 128), 257), ((6, 2, 80), 1000)])
@pytest.mark.parametrize("pattern", WINDOWS)
def test_exact(pattern, shape, length, case, dtype):
    compare(SLIDING, pattern, length, case, shape, dtype, "cuda", wants_lse=False)


@pytest.mark.gpu
def test_auto_takes_it_where_the_host_is_what_takes_time():
    q, k, v = tensors((4, 2, 64), 300, 300, torch.bfloat16, "cuda")
    assert route(call_of(q, k, v, "window(20, 0)", wants_lse=False), "auto") is SLIDING
    ones = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    assert route(call_of(q, k, v, "window(20, 0)", wants_lse=False, key_padding_mask=ones), "auto") is SLIDING
    padded = ones.clone()
    padded[0, 200:] = False
    for how in ({"key_padding_mask": padded}, {"wants_lse": True}):
        assert route(call_of(q, k, v, "window(20, 0)", **{"wants_lse": False, **how}), "auto") is not SLIDING
    long = torch.empty(1, 4, HOST_BOUND_ELEMENTS // 256 + 1, 64, dtype=torch.bfloat16, device="cuda")
    assert route(call_of(long, long, long, "window(20, 0)", wants_lse=False), "auto") is not SLIDING


@pytest.mark.gpu
def test_no_tensor_has_two_lengths():
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 64), 1999, 1999, torch.bfloat16, "cuda"))
    with AllocationInterceptor(1999) as seen:
        sparse_attention(q, k, v, "window(20, 0)").sum().backward()
    assert not seen.quadratic
