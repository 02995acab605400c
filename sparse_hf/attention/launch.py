"""Launching a Triton kernel again with little work for the host.

To find what was compiled, Triton looks at each of sixty arguments, which takes a host longer than a GPU takes for texts of some
thousand tokens. Of the kernels here, only what is in the key below compiles another one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# compiled kernels by what they were compiled for; so many that nothing real is forgotten
_compiled: dict[tuple, object] = {}
MOST = 4096
# addresses that are multiples of it are what kernels are compiled for; others are left to Triton
ALIGNED = 16


def launch(
    kernel, grid: tuple[int, int], tensors: Sequence[Tensor], strides: tuple[int, ...], numbers: Sequence[float],
    constants: dict, **options: int,
) -> None:  # fmt: skip
    """As `kernel[grid](*tensors, *strides, *numbers, **constants, **options)`, on the current stream.

    `numbers` are those that the kernel is not specialized for, integers of 32 bits with a sign and floats, each always of one type;
    `constants` come last in its signature, in that order, and tell with the dtypes which `options` there are.
    """
    key = (id(kernel), tensors[0].device.index, strides, tuple([t.dtype for t in tensors]), *constants.values())
    aligned = not any(t.data_ptr() % ALIGNED for t in tensors)
    found = _compiled.get(key) if aligned else None
    if found is not None:
        found[(*grid, 1)](*tensors, *strides, *numbers, *constants.values())
        return
    # None from Triton's interpreter
    found = kernel[grid](*tensors, *strides, *numbers, **constants, **options)
    if found is not None and aligned:
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[key] = found
