"""Launching a Triton kernel again with little work for the host.

To find what was compiled, Triton looks at each of sixty arguments, which takes a host longer than a GPU takes for texts of some
thousand tokens. Of the kernels here, only what is in the key below compiles another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

# compiled kernels by what they were compiled for; so many that nothing real is forgotten
_compiled: dict[tuple, object] = {}
MOST = 4096
# addresses that are multiples of it are what kernels are compiled for; others are left to Triton
ALIGNED = 16


class Launch:
    """`kernel[grid](*tensors, *fixed, *strides, *numbers, **constants, **options)` on the current stream, as often as it is called.

    A call gives `tensors` and `numbers`, of which dtypes, types and how many there are do not change. `numbers` are those that the kernel
    is not specialized for, integers of 32 bits with a sign and floats; `constants` come last in its signature, in that order, and tell
    with the dtypes which `options` there are.
    """

    def __init__(
        self, kernel, grid: tuple[int, int], fixed: Sequence[Tensor], strides: Sequence[int], constants: dict, **options: int
    ):  # fmt: skip
        self.kernel, self.grid, self.options, self.constants = kernel, grid, options, constants
        self.fixed, self.strides, self.values = tuple(fixed), tuple(strides), tuple(constants.values())
        self._run: Callable | None = None

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
        aligned = _are_aligned(tensors)
        run = self._run or self._found(tensors)
        if run is not None and aligned:
            run(*tensors, *self.fixed, *self.strides, *numbers, *self.values)
            return
        compiled = self.kernel[self.grid](
            *tensors, *self.fixed, *self.strides, *numbers, **self.constants, **self.options
        )
        # None from Triton's interpreter
        if compiled is not None and aligned and _are_aligned(self.fixed):
            if len(_compiled) >= MOST:
                _compiled.clear()
            _compiled[self._key(tensors)] = compiled

    def _found(self, tensors: Sequence[Tensor]) -> Callable | None:
        """What runs the kernel that was compiled for such tensors, if it was."""
        compiled = _compiled.get(self._key(tensors)) if _are_aligned(self.fixed) else None
        if compiled is not None:
            self._run = compiled[(*self.grid, 1)]
        return self._run

    def _key(self, tensors: Sequence[Tensor]) -> tuple:
        dtypes = tuple([t.dtype for t in (*tensors, *self.fixed)])
        return id(self.kernel), tensors[0].device.index, self.strides, dtypes, *self.values


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


def _are_aligned(tensors: Sequence[Tensor]) -> bool:
    # in every call: a generator would take the host longer
    for t in tensors:  # noqa: SIM110
        if t.data_ptr() % ALIGNED:
            return False
    return True
