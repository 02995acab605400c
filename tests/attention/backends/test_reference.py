"""`reference` is the specification, and dense."""

from __future__ import annotations

from sparse_hf import sparse_attention
from sparse_hf.testing import AllocationInterceptor
from tests.attention.exactness import leaves


def test_the_interceptor_sees_what_the_reference_makes():
    n = 257
    q, k, v = leaves(*[(1, 2, n, 16)] * 3)
    with AllocationInterceptor(n) as seen:
        sparse_attention(q, k, v, "window(3, 0)", backend="reference").sum().backward()
    assert any(shape[-2:] == (n, n) for _, shape in seen.quadratic)
