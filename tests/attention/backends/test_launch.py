"""Kernels that were compiled are found again without Triton, and only where they are the right ones."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.attention import launch as module
from tests import oracle
from tests.attention.exactness import DEVICE, tensors


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
    assert first[1:] == ((2, 5, 1), (a, 64, 1, 3, 0.5), {"H": 4, "S": 16, "num_warps": 4})
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


@pytest.mark.parametrize(
    ("grid", "wanted"),
    [
        ((7, 65_535), (7, 65_535, 1)),
        ((7, 65_536), (7, 32_768, 2)),
        # 24 texts, 256 classes of positions, 14 heads
        ((7, 24 * 256 * 14), (7, 43_008, 2)),
        ((7, 3 * 65_537), (7, 3, 65_537)),
        ((7, 1), (7, 1, 1)),
        ((7, 0), (7, 0, 1)),
    ],
)
def test_a_long_axis_is_spread_over_two(grid, wanted):
    """CUDA takes 65,535 programs on the second axis and on the third; batch x heads x classes of a stride may be more."""
    if max(wanted[1:]) > module.MOST_PROGRAMS:
        with pytest.raises(ValueError, match="196,611 rows of heads are more than a GPU takes at once.*another size"):
            module.spread(grid)
    else:
        assert module.spread(grid) == wanted


# patterns of no other test: launches are kept with their plans
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("pattern", ["window(19, 21) | first(2)", "stride(5) & window(61, 0)"])
def test_kernels_compute_the_same_on_an_axis_that_is_spread(pattern, monkeypatch):
    q, k, v = tensors((6, 2, 16), 130, 130, torch.float32, DEVICE)
    spread, seen = module.spread, []
    monkeypatch.setattr(module, "MOST_PROGRAMS", 4)
    monkeypatch.setattr(module, "spread", lambda grid: seen.append(spread(grid)) or seen[-1])
    got, right = (
        oracle.gradients(lambda *t, by=by: sparse_attention(*t, pattern, backend=by, return_lse=True), q, k, v)
        for by in ("triton", "blockwise")
    )
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert any(parts > 1 for _, _, parts in seen)


def test_kernels_ask_for_a_number_on_the_second_axis_alone():
    """`program_id(1)` is part of it, where the axis is spread."""
    root = Path(module.__file__).parent
    asking = [
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        if re.search(r"(program_id|num_programs)\([^0)]", file.read_text()) and file.name != "programs.py"
    ]
    assert not asking


@pytest.mark.gpu
def test_more_rows_of_heads_than_an_axis_takes():
    q = torch.randn(70_000, 1, 20, 16, device="cuda", dtype=torch.bfloat16)
    got = sparse_attention(q, q, q, "window(3, 0)", backend="triton")
    right = sparse_attention(q[-100:], q[-100:], q[-100:], "window(3, 0)", backend="triton")
    assert torch.equal(got[-100:], right)
