"""Kernels that were compiled are found again without Triton, and only where they are the right ones."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.attention import launch as module


class Kernel:
    """As `triton.jit` gives them: what is compiled takes constants by their places too."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def call(*arguments, **named):
            self.calls.append(("found", grid, arguments, named))
            return Compiled(self)

        return call


class Compiled:
    """It is given addresses and a stream."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.kernel.calls.append(("again", grid, arguments, {"stream": stream}))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def call(kernel, tensor, strides=(64, 1), number=3, **constants) -> str:
    module.launch(kernel, (2, 5), (tensor,), strides, (number, 0.5), {"H": 4, "S": 16, **constants}, num_warps=4)
    return kernel.calls[-1][0]


def test_the_same_call_is_found_again_with_all_its_arguments(kernel):
    a, b = torch.zeros(64), torch.zeros(64)
    assert call(kernel, a) == "found"
    # numbers that do not specialize may change, and tensors do
    assert call(kernel, b, number=7) == "again"
    first, second = kernel.calls
    assert first[1:] == ((2, 5), (a, 64, 1, 3, 0.5), {"H": 4, "S": 16, "num_warps": 4})
    assert second[1:] == ((2, 5, 1), (b.data_ptr(), 64, 1, 7, 0.5, 4, 16), {"stream": None})


def test_a_launch_that_is_kept_finds_what_was_compiled_once(kernel):
    fixed, tensors = torch.arange(4), [torch.zeros(64) for _ in range(3)]
    kept = module.Launch(kernel, (2, 5), (fixed,), (64, 1), {"H": 4}, num_warps=4)
    for number, t in enumerate(tensors):
        kept((t,), (number,))
    assert [one[0] for one in kernel.calls] == ["found", "again", "again"]
    assert kernel.calls[2][2] == (tensors[2].data_ptr(), fixed.data_ptr(), 64, 1, 2, 4)
    # another launch of the same kernel, dtypes, strides and constants
    module.Launch(kernel, (7, 1), (fixed,), (64, 1), {"H": 4}, num_warps=4)((tensors[0],), (0,))
    assert kernel.calls[3][:2] == ("again", (7, 1, 1))
    kept((tensors[0][1:],), (0,))
    assert kernel.calls[4][0] == "found"


def test_what_compiles_another_kernel_is_told_apart(kernel):
    tensor = torch.zeros(64)
    call(kernel, tensor)
    assert call(kernel, tensor, strides=(1, 1)) == "found"
    assert call(kernel, tensor, S=32) == "found"
    assert call(kernel, tensor.half()) == "found"
    # addresses that are no multiples of 16 bytes are Triton's business, each time
    assert [call(kernel, tensor[1:]) for _ in range(2)] == ["found", "found"]
    assert call(kernel, tensor) == "again"


def test_what_the_interpreter_ran_is_not_kept(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, **k: self.calls.append(("found",)))
    assert [call(kernel, torch.zeros(64)) for _ in range(2)] == ["found", "found"]


def test_memory_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(module, "MAX_COMPILED", 3)
    for stride in range(9):
        call(kernel, torch.zeros(64), strides=(stride,))
    assert len(module._compiled) <= 3
