"""Launching a Triton kernel again with little work for the host.

To find what was compiled, Triton looks at each of sixty arguments, which takes a host longer than a GPU takes for texts of
some thousand tokens. Of the kernels here, only what is in the key below compiles another one. Tensors are handed over as
addresses: of an address Triton asks neither Python nor the driver what it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# compiled kernels by what they were compiled for; so many that nothing real is forgotten
_compiled: dict[tuple, Any] = {}
MAX_COMPILED = 4096
# addresses that are multiples of so many bytes are what kernels are compiled for; others are left to Triton
ALIGNMENT_BYTES = 16
# programs that CUDA takes on the second axis of a grid, and on the third
MOST_PROGRAMS = 65_535


class Launch:
    """`kernel[grid](*tensors, *fixed, *strides, *numbers, **constants, **options)` on the current stream, as often as it is called.

    A call gives `tensors`, all of one device, and `numbers`, of which dtypes, types and how many there are do not change. `numbers` are
    those that the kernel is not specialized for, integers and floats; `constants` come last in its signature, in that order, and tell
    with the dtypes which `options` there are. Kernels ask `second_program` where they are on the second axis of the grid, which may be
    longer than CUDA takes.
    """

    def __init__(
        self, kernel, grid: tuple[int, int], fixed: Sequence[Tensor], strides: Sequence[int], constants: dict, **options: int
    ):  # fmt: skip
        self.kernel, self.grid, self.options, self.constants = kernel, spread(grid), options, constants
        self.fixed, self.strides, self.values = tuple(fixed), tuple(strides), tuple(constants.values())
        # tensors of `fixed` live as long as this, and so do their addresses
        self._addresses = tuple(t.data_ptr() for t in self.fixed)
        self._is_aligned = not any(address % ALIGNMENT_BYTES for address in self._addresses)
        self._run: Callable | None = None

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
        index = tensors[0].device.index
        if index is None or index == torch._C._cuda_getDevice():
            self._launch(tensors, numbers, index)
            return
        # Triton compiles for the current device and launches there, and layers of a model may be on others
        with torch.cuda.device(index):
            self._launch(tensors, numbers, index)

    def _launch(self, tensors: Sequence[Tensor], numbers: Sequence[float], index: int | None) -> None:
        addresses, bits = [], 0
        # in every call: a generator would take the host longer
        for t in tensors:
            address = t.data_ptr()
            bits |= address
            addresses.append(address)
        is_aligned = self._is_aligned and not bits % ALIGNMENT_BYTES
        if is_aligned and (self._run is not None or self._find(tensors, numbers)):
            assert self._run is not None
            stream = None if index is None else torch._C._cuda_getCurrentRawStream(index)
            self._run(stream, (*addresses, *self._addresses, *self.strides, *numbers, *self.values))
            return
        compiled = self.kernel[self.grid](
            *tensors, *self.fixed, *self.strides, *numbers, **self.constants, **self.options
        )
        # None from Triton's interpreter
        if compiled is not None and is_aligned:
            if len(_compiled) >= MAX_COMPILED:
                _compiled.clear()
            _compiled[self._key(tensors, numbers)] = compiled

    def _find(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> bool:
        """Find what runs the kernel that was compiled for such tensors and numbers, if it was."""
        compiled = _compiled.get(self._key(tensors, numbers))
        if compiled is not None:
            self._run = runner(compiled, self.grid)
        return self._run is not None

    def _key(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple:
        dtypes = tuple([t.dtype for t in (*tensors, *self.fixed)])
        # a scale may be 1 or 1.0, and a length may need 64 bits
        types = tuple(["f" if isinstance(n, float) else -(1 << 31) <= n < 1 << 31 for n in numbers])
        return id(self.kernel), tensors[0].device.index, self.strides, dtypes, types, *self.values


def spread(grid: tuple[int, int]) -> tuple[int, int, int]:
    """A grid whose second axis is spread over two, as equally as `second_program` takes it.

    Raises:
        ValueError: a number of programs that cannot be divided so.
    """
    first, second = grid
    if second <= MOST_PROGRAMS:
        return first, second, 1
    parts = next((n for n in range(-(-second // MOST_PROGRAMS), MOST_PROGRAMS + 1) if second % n == 0), None)
    if parts is None:
        raise ValueError(
            f"{second:,} rows of heads are more than a GPU takes at once, and cannot be divided into equal parts: give a batch of another "
            "size, such as one row less"
        )
    return first, second // parts, parts


def runner(compiled: Any, grid: tuple[int, int, int]) -> Callable[[int | None, tuple], None]:
    """What runs a compiled kernel: a function of a stream and all arguments.

    Triton's own way there is ten steps in Python, most of them for whoever watches launches. While nobody does, arguments go
    straight to the function in C beneath, as long as that is called as it is in the versions known (3.4 to 3.8).
    """
    plain = compiled[grid]
    found = _beneath(compiled, grid)
    if found is None:
        return lambda stream, arguments: plain(*arguments, stream=stream)
    launch, settings, takes_tuple = found
    # loaded with the kernel
    from triton import knobs

    runtime = knobs.runtime

    def run(stream: int | None, arguments: tuple) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # chains of hooks in newer versions, and functions in older ones
        if stream is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            plain(*arguments, stream=stream)
        elif takes_tuple:
            launch(*grid, stream, *settings, arguments)
        else:
            launch(*grid, stream, *settings, *arguments)

    return run


def _beneath(compiled: Any, grid: tuple[int, int, int]) -> tuple[Callable, tuple, bool] | None:
    """The function in C under Triton's launcher of a kernel, what it is given between the stream and the kernel's arguments, and
    whether it takes these as one tuple; None where it is called in another way."""
    launcher: Any = copy.copy(getattr(compiled, "run", None))
    given, stream, arguments = [], object(), (object(), object())
    own = getattr(launcher, "__dict__", {})
    if "launch" not in own or any(size for name, size in own.items() if name.endswith("scratch_size")):
        return None
    launch, own["launch"] = own["launch"], lambda *values: given.extend(values)
    try:
        launcher(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    except (AttributeError, TypeError):
        # a version whose launchers are made otherwise
        return None
    if given[:4] != [*grid, stream]:
        return None
    if given[-2:] == list(arguments):
        return launch, tuple(given[4:-2]), False
    return (launch, tuple(given[4:-1]), True) if given[-1] == arguments else None


def launch(
    kernel, grid: tuple[int, int], tensors: Sequence[Tensor], strides: Sequence[int], numbers: Sequence[float],
    constants: dict, **options: int,
) -> None:  # fmt: skip
    """A `Launch` that is made for one call."""
    Launch(kernel, grid, (), strides, constants, **options)(tensors, numbers)


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """The first three of each, of tensors of four dimensions whose last has stride 1."""
    # in every call: a generator would take the host longer
    return tuple([stride for t in tensors for stride in t.stride()[:3]])


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()
