"""Where a Triton program stands in a grid of two axes, of which `Launch` spreads the second over two."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def second_program():
    """The number of a program on the second axis."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def second_programs():
    """How many there are."""
    return tl.num_programs(2) * tl.num_programs(1)
