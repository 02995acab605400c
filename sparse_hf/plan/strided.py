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
from ..pattern.lasting import lasting
from .api import BLOCK_SIZE, build_plan
from .block_plan import BlockPlan
from .cache import remembered
from .sequences import Sequences, find_sequences

# regrouping copies what it reads and merges what it gives: it is for patterns of which it spares this many times the pairs
MIN_GAIN = 2
# keys per query that the copies cost as much as
KEYS_OF_COPIES = 64


def is_worth_regrouping(form: StrideForm, length: int, has_batch: bool) -> bool:
    """Is it worth it? In keys per query; `has_batch` says that there is padding, documents or marks."""
    rest = form.rest_form
    near = rest.window if rest is not None else None
    # tokens of one residue
    tokens = -(-length // form.step)
    width = _width(form.window, length)
    # each of the strided keys is in two blocks, if the step is longer than those
    plain = min(length, width + BLOCK_SIZE, (width // form.step + 1) * 2 * BLOCK_SIZE)
    ours = KEYS_OF_COPIES + min(tokens, _width(in_steps(form.window, form.step), tokens) + BLOCK_SIZE)
    ours += 0 if near is None else min(length, _width(near, length) + BLOCK_SIZE)
    if has_batch or (form.window.right != 0 and length % form.step) or (rest is not None and rest.has_globals):
        # residues that differ are done one by one, each of which costs a block at least
        ours += BLOCK_SIZE * BLOCK_SIZE // min(BLOCK_SIZE, tokens)
    return plain >= MIN_GAIN * ours


def _width(window: Window, length: int) -> int:
    """Keys per query, at most; an open side is half of the sequence in the mean."""
    return sum(length // 2 if side is None else side for side in (window.left, window.right))


@dataclass(frozen=True, eq=False)
class Regrouped:
    """What takes the place of a `BlockPlan` where a pattern is regrouped. Queries are all the tokens."""

    strides: StrideForm
    kv_len: int
    sequences: Sequences  # on the CPU
    rest: BlockPlan | None
    device: torch.device

    @property
    def step(self) -> int:
        return self.strides.step

    @property
    def heads(self) -> tuple[int, ...]:
        """Empty: all heads share the pattern."""
        return ()

    @property
    def batch_rows(self) -> int:
        return self.sequences.rows

    @property
    def q_len(self) -> int:
        return self.kv_len

    @property
    def q_offset(self) -> int:
        return 0


def regrouped(
    strides: StrideForm,
    kv_len: int,
    batch: tuple[Tensor | None, Tensor | None, Tensor | None],
    device: torch.device | str,
    block_size: int = BLOCK_SIZE,
) -> Regrouped:
    """The plan of `strides` for `batch`, which is `(key_padding_mask, segment_ids, marks)` as in `build_plan`."""
    real, documents, marks = batch
    rest = None
    if strides.rest is not None:
        rest = build_plan(
            strides.rest, kv_len, key_padding_mask=real, segment_ids=documents, marks=marks, block_size=block_size,
            device=device,
        )  # fmt: skip
    form = strides.rest_form
    asked = marks if form is not None and form.marked else None
    with lasting():
        sequences = find_sequences(kv_len, real, documents, asked).to("cpu")
    return Regrouped(strides, kv_len, sequences, rest, torch.device(device))


@remembered
def strided_plan(plan: Regrouped, batch: int) -> BlockPlan:
    """The plan of the tokens side by side: one for all rows, or `batch * step` rows, residue by residue."""
    sequences, step, length = plan.sequences, plan.step, -(-plan.kv_len // plan.step)
    # what fills up the last step may be seen by those that look ahead
    filled = plan.kv_len % step and plan.strides.window.right != 0
    real = sequences.real
    if real is None and (filled or sequences.start is not None):
        real = torch.ones(sequences.rows, plan.kv_len, dtype=torch.bool, device="cpu")

    def residues(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        # tokens that fill up are padding, which belongs to no document
        t = torch.nn.functional.pad(t, (0, -plan.kv_len % step), value=0)
        t = t.unflatten(1, (length, step)).transpose(1, 2)  # [B or 1, s, N]
        return t.expand(batch, -1, -1).flatten(0, 1)

    return build_plan(
        plan.strides.side_by_side,
        length,
        key_padding_mask=residues(real),
        segment_ids=residues(sequences.start),
        marks=residues(_global_tokens(plan)),
        device=plan.device,
    )


def _global_tokens(plan: Regrouped) -> Tensor | None:
    """The global tokens of the rest, `[B or 1, K]` bool."""
    sequences, form = plan.sequences, plan.strides.rest_form
    if form is None or not form.has_globals:
        return None
    index = torch.arange(plan.kv_len, device="cpu")[None]
    first = index < form.first if sequences.start is None else index - sequences.start < form.first
    return first if sequences.marks is None else first | sequences.marks
