"""Which tiles a threshold keeps, by the kernels of `chosen_threshold_kernels.py`: products of queries and keys in two passes.

Legend: B batch, H query heads, Q queries, D head dim; Nq and Nk tiles of queries and of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan.cache import remembered
from ..backend import AttentionCall
from ..backends.triton.walk import launch_options, why_unfit
from ..launch import launch, power_of_two, strides_of
from ..strides import readable
from .chosen_lists import Flags, Kinds


@dataclass(frozen=True, eq=False)
class Visits:
    """The tiles of each line of queries in the order in which they are judged, those with pairs of positions or a mask first.

    The others follow from the first of a text and then from the nearest to the farthest, so that the heaviest keys come early.

    Attributes:
        offsets: where the entries of each line begin, `[Nq + 1]` int32.
        mixed: how many of them come first, `[Nq]` int32.
        others: the tile of keys of each entry, int32.
    """

    offsets: Tensor
    mixed: Tensor
    others: Tensor


@remembered
def find_visits(kinds: Kinds) -> Visits:
    plane = kinds.by_query
    lines, columns = plane.joint.shape
    i, j = (plane.joint >= 0).nonzero(as_tuple=True)
    is_mixed = (plane.joint[i, j] > 0) | (plane.beside[i, j] >= 0)
    last = j.where(is_mixed | (j == 0), columns - j)
    order = ((i * 2 + ~is_mixed) * (columns + 1) + last).argsort()
    counts = [torch.zeros(lines, dtype=torch.int32, device=i.device) for _ in range(2)]
    for count, add in zip(counts, (torch.ones_like(i), is_mixed), strict=True):
        count.index_add_(0, i, add.int())
    offsets = torch.nn.functional.pad(counts[0].cumsum(0, dtype=torch.int32), (1, 0))
    return Visits(offsets, counts[1], j[order].int())


def why_not(call: AttentionCall) -> str | None:
    """Why the kernels cannot judge a call's tiles, or None."""
    return why_unfit(call.q, call.q)


def judge(call: AttentionCall, share: float, kinds: Kinds, tell: bool) -> tuple[Tensor, Tensor | None]:
    """The tiles that are kept, `[B, H, Nq, Nk]` uint8, and if `tell` the share of weights that is left out, `[B, H, Q]`."""
    from . import chosen_threshold_kernels as kernels

    q, k, plane, visits = readable(call.q), readable(call.k), kinds.by_query, find_visits(kinds)
    (batch, heads, _, dim), (lines, columns) = q.shape, plane.joint.shape
    flags = torch.zeros(batch, heads, lines, columns, dtype=torch.uint8, device=q.device)
    top = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    # without a listener neither is read or written: anything will do
    total, lost = (torch.empty_like(top) if tell else top for _ in range(2))
    scoring = call.scoring
    numbers = (
        scoring.scale, float(scoring.softcap or 1), math.log2(share), q.shape[2], k.shape[2], lines, columns,
    )  # fmt: skip
    constants = {
        "H": heads, "R": heads // k.shape[1], "HAS_CAP": scoring.softcap is not None, "TELL": tell, "S": kinds.masks.shape[1],
        "D": dim, "BD": max(16, power_of_two(dim)), "PRECISION": "ieee",
    }  # fmt: skip
    given = (q, k, top, total, lost, flags, plane.joint, plane.beside)
    grid, options = (lines, batch * heads), launch_options(q)[0]

    def run(kernel, *lists: Tensor) -> None:
        launch(kernel, grid, (*given, *lists, kinds.masks), strides_of(q, k), numbers, constants, **options)

    run(kernels.judge, visits.offsets, visits.mixed, visits.others)
    # only those that are left, and none of positions alone
    left = Flags(lambda: flags).listed(kinds.alone, flags, (1, 0, 1, 0), None)
    run(kernels.judge_again, left.offsets, left.others)
    return flags, lost if tell else None
