"""On a GPU, another length compiles nothing anew."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["flex", "triton"])
@pytest.mark.parametrize("pattern", ["window(100, 0)", "window(100, 100) | first(2)", "bigbird(block_size=64)"])
def test_another_length_compiles_nothing(pattern, backend, monkeypatch):
    import triton

    # Triton tells lengths that are multiples of 16 from others
    for length in (1001, 1024):
        step(pattern, backend, length)
    graphs, kernels = torch._dynamo.utils.counters["stats"]["unique_graphs"], []
    # called for every kernel that is not known in this process
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **given: kernels.append(given["key"]))
    for length in (1777, 2048, 4096):
        step(pattern, backend, length)
    assert not kernels and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def step(pattern: str, backend: str, length: int) -> None:
    shape = (2, 4, length, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sparse_attention(q, k, v, pattern, backend=backend).sum().backward()
