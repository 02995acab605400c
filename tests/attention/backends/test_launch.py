"""Kernels that were compiled are found again without Triton, and only where they are the right ones."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sparse_hf import sparse_attention
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


def test_numbers_of_another_type_compile_another_kernel(kernel):
    tensor = torch.zeros(64)

    def found(*numbers):
        module.launch(kernel, (2, 5), (tensor,), (64, 1), numbers, {"H": 4})
        return kernel.calls[-1][0]

    assert [found(1, 3), found(2, 3), found(1.0, 3), found(0.5, -3)] == ["found", "again", "found", "again"]
    assert [found(1, 1 << 31), found(1, 1 << 40), found(1, 7)] == ["found", "again", "again"]


class OnDevice:
    """A tensor of a GPU."""

    dtype, device = torch.float32, SimpleNamespace(index=1)

    def __init__(self, address: int):
        self.data_ptr = lambda: address


@pytest.mark.parametrize("address", [64, 65], ids=["aligned", "not aligned"])
def test_kernels_run_on_the_device_of_their_tensors(address, kernel, monkeypatch):
    """Layers of a model that is spread over several GPUs have tensors on others than the current one."""
    current, seen = [0], []

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    class Noted(Kernel):
        def __getitem__(self, grid):
            seen.append(current[-1])
            return super().__getitem__(grid)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    kernel, ran = Noted(), []
    run = module.runner
    monkeypatch.setattr(
        module, "runner", lambda *given: lambda *asked: (ran.append((current[-1], asked[0])), run(*given)(*asked))
    )
    for _ in range(3):
        module.launch(kernel, (2, 5), (OnDevice(address),), (64, 1), (3,), {"H": 4})
    assert current == [0] and set(seen) == {1}
    assert ran == ([(1, 71)] * 2 if address == 64 else [])


def test_what_the_interpreter_ran_is_not_kept(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, **k: self.calls.append(("found",)))
    assert [call(kernel, torch.zeros(64)) for _ in range(2)] == ["found", "found"]


def test_memory_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(module, "MAX_COMPILED", 3)
    for stride in range(9):
        call(kernel, torch.zeros(64), strides=(stride,))
    assert len(module._compiled) <= 3


class Launcher:
    """As Triton's own: what it is made of stands between the stream and the kernel's arguments."""

    takes_tuple = False

    def __init__(self, seen: list, scratch: int = 0):
        self.launch, self.global_scratch_size, self.cooperative = lambda *given: seen.append(given), scratch, False

    def __call__(self, x, y, z, stream, function, *rest):
        metadata, arguments = rest[:4], rest[4:]
        if self.takes_tuple:
            self.launch(x, y, z, stream, function, self.cooperative, *metadata, None, arguments)
        else:
            self.launch(x, y, z, stream, function, self.cooperative, None, *metadata, *arguments)


class TupleLauncher(Launcher):
    takes_tuple = True


class OlderLauncher(Launcher):
    """One of another signature."""

    def __call__(self, grid, stream):
        raise AssertionError("never reached")


class Loaded:
    """A compiled kernel with the launcher of its versions of Triton."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, launcher, hooked: list):
        self.run, self.hooked = launcher, hooked

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.hooked.append((grid, stream, arguments))


@pytest.fixture
def runtime(monkeypatch):
    triton = pytest.importorskip("triton")
    found = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(triton.knobs, "runtime", found)
    return found


@pytest.mark.parametrize("kind", [Launcher, TupleLauncher])
def test_nobody_is_asked_between_a_launch_and_the_function_in_c(kind, runtime):
    seen, plain = [], []
    launcher = kind(seen)
    run = module.runner(Loaded(launcher, plain), (2, 5, 1))
    run(99, (1, 2, 3))
    # the same as Triton's own way
    launcher(2, 5, 1, 99, 7, (4, 1, 0), None, None, None, 1, 2, 3)
    assert seen[0] == seen[1] and len(seen) == 2 and not plain


@pytest.mark.parametrize("kind", [Launcher, TupleLauncher])
def test_whoever_watches_launches_is_told(kind, runtime):
    seen, plain = [], []
    run = module.runner(Loaded(kind(seen), plain), (2, 5, 1))
    for hook in (print, SimpleNamespace(calls=[print])):
        runtime.launch_enter_hook = hook
        run(99, (1,))
    runtime.launch_enter_hook = None
    run(99, (1,))
    assert plain == [((2, 5, 1), 99, (1,))] * 2 and len(seen) == 1


@pytest.mark.parametrize(
    "launcher",
    [OlderLauncher([]), Launcher([], scratch=16), print, None],
    ids=["signature", "scratch", "function", "none"],
)
def test_launchers_that_are_not_as_known_are_left_to_triton(launcher, runtime):
    plain = []
    module.runner(Loaded(launcher, plain), (2, 5, 1))(99, (1,))
    assert plain == [((2, 5, 1), 99, (1,))]


@pytest.mark.gpu
def test_triton_s_own_way_is_known():
    """What is launched beneath its steps gives the same; a version that is called otherwise is to be looked at."""
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    results = [sparse_attention(q, k, v, "window(9, 9) | first(1)", backend="triton") for _ in range(3)]
    assert all(torch.equal(results[0], one) for one in results[1:])
    assert any(module._beneath(compiled, (1, 1, 1)) is not None for compiled in module._compiled.values())
