"""A Triton kernel that lists the tiles of a choice on the device, so that no host waits for what was chosen.

Legend: B batch, H query heads; a line is a tile of queries (of keys) of a head of a batch row, and its others are tiles of keys (of
queries).
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..programs import second_program


@triton.jit(
    do_not_specialize=[
        "flag_row",
        "flag_line",
        "lines",
        "columns",
        "per_line",
        "shift_line",
        "per_other",
        "shift_other",
    ]
)
def list_tiles(
    flags, joint, beside, ends, offsets, masked, others, masks,
    flag_row, flag_line, lines, columns, per_line, shift_line, per_other, shift_other,
    WRITE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Count the tiles of a line, those with a mask apart, or write them, those with a mask first.

    Counts of lines go to `offsets`, behind a zero; where `WRITE`, `offsets` says where each line begins. Of a tile that is chosen the
    kind is that in `joint`, else that in `beside`: -1 holds nothing, 0 all pairs, and more is 1 + the number of a mask.
    """
    line, row = tl.program_id(0), second_program().to(tl.int64)
    at = row * lines + line
    flags += row * flag_row + ((line + shift_line) // per_line).to(tl.int64) * flag_line
    of_line = line.to(tl.int64) * columns
    begin, end = tl.load(ends + 2 * line), tl.load(ends + 2 * line + 1)
    with_mask, whole = 0, 0
    if WRITE:
        with_mask = tl.load(offsets + at)
        whole = with_mask + tl.load(masked + at)
    for start in range(begin, end, BN):
        other = start + tl.arange(0, BN)
        inside = other < end
        flag = tl.load(flags + (other + shift_other) // per_other, mask=inside, other=0)
        chosen = tl.load(joint + of_line + other, mask=inside, other=-1).to(tl.int32)
        held = tl.load(beside + of_line + other, mask=inside, other=-1).to(tl.int32)
        kind = tl.where(flag != 0, chosen, held)
        some, full = (kind > 0).to(tl.int32), (kind == 0).to(tl.int32)
        if WRITE:
            place = tl.where(kind > 0, with_mask + tl.cumsum(some, 0), whole + tl.cumsum(full, 0)) - 1
            tl.store(others + place, other, mask=kind >= 0)
            tl.store(masks + place, tl.maximum(kind - 1, 0), mask=kind >= 0)
        with_mask += tl.sum(some)
        whole += tl.sum(full)
    if not WRITE:
        tl.store(masked + at, with_mask)
        tl.store(offsets + at + 1, with_mask + whole)
