"""A plan of strides: tokens that lie a multiple of `step` apart are put side by side, where what they see is a window.

A stride below the block size touches every block, so that as blocks it costs what dense attention costs. Of the tokens with one
index modulo `step` it is `window(a // step, b // step)`: distance is all that counts, so that this holds under padding and
packing too. The rest of the pattern is a plan of its own. A pair that both hold is left to the rest.

Legend: B batch rows, K tokens, s the step, N = ceil(K / s) tokens of one residue (index modulo s).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pattern import Window
from ..pattern.forms import StrideForm, in_steps
from .block_plan import BlockPlan
from .cache import remembered
from .sequences import Layout, make_layout

# regrouping copies what it reads and merges what it gives: it is for patterns of which it spares this many times the pairs
GAIN = 2
# keys that a block costs beyond those that it holds
BLOCK = 128
# keys per query that the copies cost as much as
COPIES = 64


def is_worth_regrouping(form: StrideForm, length: int, has_batch: bool) -> bool:
    """Is it worth it? In keys per query; `has_batch` says that there is padding, documents or marks."""
    near = form.shape.window if form.shape is not None else None
    group = -(-length // form.step)
    width = _width(form.window, length)
    # each of the strided keys is in two blocks, if the step is longer than those
    plain = min(length, width + BLOCK, (width // form.step + 1) * 2 * BLOCK)
    ours = COPIES + min(group, _width(in_steps(form.window, form.step), group) + BLOCK)
    ours += 0 if near is None else min(length, _width(near, length) + BLOCK)
    if has_batch or (form.window.right != 0 and length % form.step) or (form.shape and form.shape.has_globals):
        # residues that differ are done one by one, each of which costs a block at least
        ours += BLOCK * BLOCK // min(BLOCK, group)
    return plain >= GAIN * ours


def _width(window: Window, length: int) -> int:
    """Keys per query, at most; an open side is half of the sequence in the mean."""
    return sum(length // 2 if side is None else side for side in (window.left, window.right))


@dataclass(frozen=True, eq=False)
class Regrouped:
    """What takes the place of a `BlockPlan` where a pattern is regrouped. Queries are all the tokens."""

    strides: StrideForm
    kv_len: int
    layout: Layout  # on the CPU
    rest: BlockPlan | None
    device: torch.device
    heads: tuple[int, ...] = ()

    @property
    def step(self) -> int:
        return self.strides.step

    @property
    def batch_rows(self) -> int:
        return self.layout.rows


@dataclass(frozen=True, eq=False)
class ByHeads:
    """Patterns per head of which some are regrouped: a plan for the heads that share one."""

    heads: tuple[int, ...]
    plans: tuple[BlockPlan | Regrouped, ...]

    @property
    def batch_rows(self) -> int:
        return max(plan.batch_rows for plan in self.plans)


AnyPlan = BlockPlan | Regrouped | ByHeads


def regrouped(strides: StrideForm, kv_len: int, batch: tuple, device, block_size: int = BLOCK) -> Regrouped:
    """The plan of `strides` for `batch`, which is `(key_padding_mask, segment_ids, marks)` as in `build_plan`."""
    from . import build_plan

    real, documents, marks = batch
    rest = None
    if strides.rest is not None:
        rest = build_plan(
            strides.rest, kv_len, key_padding_mask=real, segment_ids=documents, marks=marks, block_size=block_size,
            device=device,
        )  # fmt: skip
    shape = strides.shape
    asked = marks if shape is not None and shape.marked else None
    layout = make_layout(kv_len, real, documents, asked).to("cpu")
    return Regrouped(strides, kv_len, layout, rest, torch.device(device))


@remembered
def strided_plan(plan: Regrouped, batch: int) -> BlockPlan:
    """The plan of the tokens side by side: one for all rows, or `batch * step` rows, residue by residue."""
    from . import build_plan

    layout, step, length = plan.layout, plan.step, -(-plan.kv_len // plan.step)
    pattern = plan.strides.side_by_side
    flags = _global_tokens(plan)
    # what fills up the last step may be seen by those that look ahead
    filled = plan.kv_len % step and plan.strides.window.right != 0
    real = layout.real
    if real is None and (filled or layout.start is not None):
        real = torch.ones(layout.rows, plan.kv_len, dtype=torch.bool)
    given = (real, layout.start, flags)

    def rows(t: Tensor | None, fill: int) -> Tensor | None:
        if t is None:
            return None
        t = torch.nn.functional.pad(t, (0, -plan.kv_len % step), value=fill)
        t = t.unflatten(1, (length, step)).transpose(1, 2)  # [B or 1, s, N]
        return t.expand(batch, -1, -1).flatten(0, 1)

    # tokens that fill up are padding, which belongs to no document
    real, documents, flags = (rows(t, 0) for t in given)
    return build_plan(
        pattern, length, key_padding_mask=real, segment_ids=documents, marks=flags, device=plan.device
    )  # fmt: skip


def _global_tokens(plan: Regrouped) -> Tensor | None:
    """The global tokens of the rest, `[B or 1, K]` bool."""
    layout, shape = plan.layout, plan.strides.shape
    if shape is None or not shape.has_globals:
        return None
    index = torch.arange(plan.kv_len)[None]
    first = index < shape.first if layout.start is None else index - layout.start < shape.first
    return first if layout.marks is None else first | layout.marks
