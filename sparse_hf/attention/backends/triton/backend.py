"""Triton kernels over the plan's lists of tiles: any pattern, one pass forward and two backward, on a GPU.

Where a window has a FlashAttention kernel that one is faster on long texts; this one takes every pattern, heads with patterns of
their own, soft caps and dropout, compiles once, and is a few launches where merging parts is dozens.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....plan import BlockPlan
from ....plan.tile_lists import Lists, TileLists, tile_lists
from ...dropout import threshold
from ...scoring import Scoring
from ...strides import like, readable
from .launch import MOST, Launch, strides_of

# places of a tile: windows are cut to it with little waste, and registers hold what a tile sums up
TILE, SMALLER = 64, (16, 32)
# `backward` takes None for a gradient of zero
NONE_IS_ZERO = True
IS_INSTALLED = find_spec("triton") is not None
# set by tests, which run the kernels in Triton's interpreter
DEVICES = {"cuda"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# head dims; products in float32 are unrolled, which takes minutes to compile for wider ones
WIDEST, WIDEST_EXACT = 256, 128


def refuses(q: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float) -> str | None:
    return "its kernels have no relative bias; use backend='flex'" if scoring.bias is not None else unfit(q, v)


def unfit(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot compute these tensors, or None."""
    if q.device.type not in DEVICES:
        return f"it needs a GPU and q is on {q.device}"
    if not IS_INSTALLED:
        return "it needs the package triton, which torch brings for GPUs on Linux"
    if q.dtype not in DTYPES:
        return f"its kernels compute in 16 or 32 bits and q is {q.dtype}; use backend='blockwise'"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > WIDEST:
        return f"head dims of q and v are {q.shape[-1]} and {v.shape[-1]}; they must be one number up to {WIDEST}"
    if q.dtype == torch.float32 and q.shape[-1] > WIDEST_EXACT:
        return f"in float32 its kernels take head dims up to {WIDEST_EXACT} and q has {q.shape[-1]}; use backend='blockwise'"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` in the dtype of q and lse `[B, H, Q]` in float32, differentiable."""
    return _Tiles.apply(q, k, v, plan, scoring, dropout, seed)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scoring, dropout, seed):
        out, lse = forward(q, k, v, plan, scoring, dropout, seed)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = plan, scoring, dropout, seed
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        return *backward(*ctx.saved_tensors, grad_out, grad_lse, *ctx.rest)[:3], None, None, None, None


def forward(q, k, v, plan: BlockPlan, scoring: Scoring, dropout: float, seed) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]`, whose memory is that of `[B, Q, H, D]`, and lse `[B, H, Q]`."""
    q, k, v = map(readable, (q, k, v))
    out, lse = like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel():
        _call(q, plan, scoring, dropout, seed).forward(q, k, v, out, lse)
    return out, lse


def backward(
    q, k, v, out, lse, grad_out, grad_lse, plan: BlockPlan, scoring: Scoring, dropout: float, seed
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of q, k, v and no bias, given those of out and lse (None: zero)."""
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    q, k, v, out, grad_out = map(readable, (q, k, v, out, grad_out))
    grads = tuple(map(like, (q, k, v)))
    if q.numel():
        _call(q, plan, scoring, dropout, seed).backward(q, k, v, out, lse, grad_out, grad_lse, grads)
    else:
        for grad in grads:
            grad.zero_()
    return *grads, None


def _call(q: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float, seed: Tensor | None) -> Call:
    return Call(tile_lists(plan, tile_size(plan), q.shape[0], q.shape[1]), scoring, dropout, seed)


def tile_size(plan: BlockPlan) -> int:
    """Places of a tile: fewer where the plan's blocks are smaller and need no masks in them."""
    return plan.block_size if plan.block_size in SMALLER else TILE


@dataclass(frozen=True)
class Call:
    """One attention call of the kernels, which write to the tensors that they are given.

    `index` `[B * H, W]` says which token stands at each place, of `rounds` rounds; None: places are tokens. Of several rounds results are
    written by place, `[B, H, W, D]`, and have no segments. `relation` says which tokens of another order may see each other.
    """

    tiles: TileLists
    scoring: Scoring
    dropout: float
    seed: Tensor | None
    index: Tensor | None = None
    rounds: int = 1
    relation: int = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        lists = self.tiles.by_query
        parts = self._parts(lists, out, lse)
        # the last number is of a row of lse
        strides = (*strides_of(q, k, v, out), lse.shape[2])
        self._walk("forward", q, k, (q, k, v, out, lse, *parts), strides)
        if lists.cut:
            self._join("merge_segments", lists, (*parts, lists.long, out, lse), (*strides_of(out), lse.shape[2]))

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, grads: Sequence[Tensor]) -> None:
        """Write the gradients of q, k and v to `grads`, given those of out and lse (None: zero)."""
        grad_q, *grads_of_keys = grads
        lse = lse.contiguous()
        # anything will do where it is not read
        given_lse = lse if grad_lse is None else grad_lse.contiguous()
        places = q.shape[2] if self.index is None else self.index.shape[1]
        delta = torch.empty(*q.shape[:2], places, dtype=torch.float32, device=q.device)
        lengths = lse.shape[2], places

        parts = self._parts(self.tiles.by_query, grad_q)
        tensors = grad_out, q, k, v, out, lse, given_lse, delta, grad_q, *parts
        strides = (*strides_of(grad_out, q, k, v, out, grad_q), *lengths)
        self._walk("gradients_of_queries", q, k, tensors, strides, HAS_GRAD_LSE=grad_lse is not None)
        self._add(parts, self.tiles.by_query, (grad_q,))

        parts = self._parts(self.tiles.by_key, *grads_of_keys)
        tensors = grad_out, q, k, v, lse, delta, *grads_of_keys, *parts
        strides = (*strides_of(grad_out, q, k, v, *grads_of_keys), *lengths)
        self._walk("gradients_of_keys", q, k, tensors, strides)
        self._add(parts, self.tiles.by_key, grads_of_keys)

    def _known(self, alike: tuple, prepare: Callable[[], Launch]) -> Launch:
        """What `prepare` gives, found once for calls over these lists that are alike."""
        known = self.tiles.__dict__.setdefault("_launches", {})
        if alike not in known:
            if len(known) >= MOST:
                known.clear()
            known[alike] = prepare()
        return known[alike]

    def _walk(self, name: str, q: Tensor, k: Tensor, tensors: Sequence[Tensor], strides: tuple, **flags: bool) -> None:
        """Run a kernel that walks lists: those of the queries, or of the keys."""
        how = self.scoring, self.dropout, self.relation
        alike = name, strides, q.shape, k.shape, q.dtype, q.device, *how, *flags.values()
        lists = self._lists(name)
        # where places are tokens no index is read, and anything will do
        index = self.tiles.group_of if self.index is None else self.index
        seed = 0 if self.seed is None else int(self.seed)
        dropped = _word(seed), _word(threshold(self.dropout)), 1 / (1 - self.dropout)
        width = 0 if self.index is None else self.index.shape[1]
        of_lists = lists.cut, lists.lines, lists.limit, width, width, lists.lines // self.rounds
        numbers = self.scoring.scale, float(self.scoring.softcap or 1), *dropped, q.shape[2], k.shape[2], *of_lists
        self._known(alike, lambda: self._walker(name, q, k, strides, flags))((*tensors, index, index), numbers)

    def _lists(self, name: str) -> Lists:
        return self.tiles.by_key if name == "gradients_of_keys" else self.tiles.by_query

    def _walker(self, name: str, q: Tensor, k: Tensor, strides: tuple, flags: dict) -> Launch:
        from . import tile_kernels

        lists, of_keys = self._lists(name), name == "gradients_of_keys"
        heads = k if of_keys else q
        masks = self.tiles.masks_by_key if of_keys else self.tiles.masks
        of_lists = lists.offsets, lists.masked, lists.others, lists.masks
        fixed = self.tiles.group_of, *of_lists, masks, lists.segments
        constants = {
            **flags, "H": q.shape[1], "R": q.shape[1] // k.shape[1], "CUT": lists.cut > 0, "INDEXED": self.index is not None,
            "BY_PLACE": self.rounds > 1, "RELATION": self.relation, "HAS_CAP": self.scoring.softcap is not None,
            "DROPOUT": self.dropout > 0, **self._shape(q), "PRECISION": "ieee",
        }  # fmt: skip
        grid, options = (lists.items, heads.shape[0] * heads.shape[1]), launches(q)[name != "forward"]
        return Launch(getattr(tile_kernels, name), grid, fixed, strides, constants, **options)

    def _join(self, name: str, lists: Lists, tensors: Sequence[Tensor], strides: tuple, **flags: bool) -> None:
        """Run a kernel that adds what segments found to results `[B, heads, length, D]`, the fourth of `tensors`."""
        total = tensors[3]
        batch, heads, length, _ = total.shape

        def joiner() -> Launch:
            from . import tile_kernels

            constants = {"H": heads, **flags, **self._shape(total)}
            return Launch(getattr(tile_kernels, name), (len(lists.long), batch * heads), (), strides, constants)

        alike = name, len(lists.long), strides, total.shape, total.dtype, total.device, *flags.values()
        self._known(alike, joiner)(tensors, (length,))

    def _shape(self, q: Tensor) -> dict:
        """The sides of what the kernels hold; the matrix units take powers of two from 16."""
        return {"S": self.tiles.size, "D": q.shape[3], "BD": max(16, 1 << (q.shape[3] - 1).bit_length())}

    def _parts(self, lists: Lists, *results: Tensor) -> list[Tensor]:
        """What the segments find of each of `results` `[B, heads, length, ...]`, in float32; without any, anything will do."""
        if not lists.cut:
            return list(results)
        return [
            t.new_empty((lists.cut, t.shape[0] * t.shape[1], self.tiles.size, *t.shape[3:]), dtype=torch.float32)
            for t in results
        ]

    def _add(self, parts: Sequence[Tensor], lists: Lists, grads: Sequence[Tensor]) -> None:
        """Add what segments found to one or two gradients `[B, heads, length, D]`."""
        if lists.cut:
            # of a single one both are the same, and the second is left alone
            tensors = parts[0], parts[-1], lists.long, grads[0], grads[-1]
            self._join("add_segments", lists, tensors, strides_of(grads[0], grads[-1]), TWO=len(grads) > 1)


def _word(number: int) -> int:
    """The same 32 bits with a sign, so that all seeds are of one type."""
    return number - (1 << 32) if number >= 1 << 31 else number


def launches(q: Tensor) -> tuple[dict, dict]:
    """Warps and stages of the forward and of the backward kernels."""
    # measured on an H200; more stages than these do not fit its shared memory
    size = q.shape[3] * q.element_size()
    stages = (3, 3) if size <= 128 else (3, 2) if size <= 256 else (2, 1)
    return tuple({"num_warps": 4, "num_stages": number} for number in stages)
