"""Triton kernels over the plan's lists of tiles: any pattern, one pass forward and two backward, on a GPU.

Where a window has a FlashAttention kernel that one is faster on long texts; this one takes every pattern, heads with patterns of
their own, soft caps and dropout, compiles once, and is a few launches where merging parts is dozens.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..plan import BlockPlan
from ..plan.lists import LIMIT, Lists, TileLists, tile_lists
from .scoring import Scoring

# places of a tile: windows are cut to it with little waste, and registers hold what a tile sums up
TILE, SMALLER = 64, (16, 32)
# `backward` takes None for a gradient of zero
NONE_IS_ZERO = True
# set by tests, which run the kernels in Triton's interpreter
DEVICES = {"cuda"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# head dims; products in float32 are unrolled, which takes minutes to compile for wider ones
WIDEST, WIDEST_EXACT = 256, 128


def refuses(q: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float) -> str | None:
    if q.device.type not in DEVICES:
        return f"it needs a GPU and q is on {q.device}"
    if not is_installed():
        return "it needs the package triton, which torch brings for GPUs on Linux"
    if q.dtype not in DTYPES:
        return f"its kernels compute in 16 or 32 bits and q is {q.dtype}; use backend='blockwise'"
    if scoring.bias is not None:
        return "its kernels have no relative bias; use backend='flex'"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > WIDEST:
        return f"head dims of q and v are {q.shape[-1]} and {v.shape[-1]}; they must be one number up to {WIDEST}"
    if q.dtype == torch.float32 and q.shape[-1] > WIDEST_EXACT:
        return f"in float32 its kernels take head dims up to {WIDEST_EXACT} and q has {q.shape[-1]}; use backend='blockwise'"
    return None


@lru_cache(maxsize=1)
def is_installed() -> bool:
    return find_spec("triton") is not None


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
    from . import tile_kernels as kernels

    q, k, v = map(readable, (q, k, v))
    call = _call(q, k, plan, scoring, dropout, seed)
    lists = call.tiles.by_query
    out = like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not q.numel():
        return out, lse
    tables = call.tables(lists, call.tiles.masks)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], q.shape[2]
    rows = q.shape[0] * q.shape[1]
    kernels.forward[(lists.lines, rows)](
        q, k, v, out, lse, *tables, *strides, *call.numbers(lists), SEGMENT=False, **call.constants, **call.launch
    )
    if len(lists.segments):
        part_out, part_lse = call.scratch(lists, rows, q.shape[3])
        kernels.forward[(len(lists.segments), rows)](
            q, k, v, part_out, part_lse, *tables, *strides, *call.numbers(lists),
            SEGMENT=True, **call.constants, **call.launch,
        )  # fmt: skip
        kernels.merge_segments[(len(lists.long), rows)](
            part_out,
            part_lse,
            lists.long,
            out,
            lse,
            *out.stride()[:3],
            q.shape[2],
            q.shape[2],
            H=q.shape[1],
            **call.shape,
        )
    return out, lse


def backward(
    q, k, v, out, lse, grad_out, grad_lse, plan: BlockPlan, scoring: Scoring, dropout: float, seed
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of q, k, v and no bias, given those of out and lse (None: zero)."""
    from . import tile_kernels as kernels

    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    q, k, v, out, grad_out = map(readable, (q, k, v, out, grad_out))
    call = _call(q, k, plan, scoring, dropout, seed)
    grad_q, grad_k, grad_v = map(like, (q, k, v))
    if not q.numel():
        return grad_q, grad_k.zero_(), grad_v.zero_(), None
    lse = lse.contiguous()
    has_grad_lse = grad_lse is not None
    # anything will do where it is not read
    grad_lse = grad_lse.contiguous() if has_grad_lse else lse
    delta = torch.empty_like(lse)
    length, rows = q.shape[2], q.shape[0] * q.shape[1]
    of_q = *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]

    lists = call.tiles.by_query
    given = grad_out, q, k, v, out, lse, grad_lse, delta
    tables = call.tables(lists, call.tiles.masks)
    rest = {"HAS_GRAD_LSE": has_grad_lse, **call.constants, **call.launch_backward}
    strides = *of_q, *out.stride()[:3], *grad_q.stride()[:3], length, length
    kernels.gradients_of_queries[(lists.lines, rows)](
        *given, grad_q, *tables, *strides, *call.numbers(lists), SEGMENT=False, **rest
    )
    if len(lists.segments):
        part, _ = call.scratch(lists, rows, q.shape[3])
        kernels.gradients_of_queries[(len(lists.segments), rows)](
            *given, part, *tables, *strides, *call.numbers(lists), SEGMENT=True, **rest
        )
        kernels.add_segments[(len(lists.long), rows)](
            part, lists.long, grad_q, *grad_q.stride()[:3], length, H=q.shape[1], **call.shape
        )

    lists, rows = call.tiles.by_key, k.shape[0] * k.shape[1]
    given = grad_out, q, k, v, lse, delta
    tables = call.tables(lists, call.tiles.masks_by_key)
    strides = *of_q, *grad_k.stride()[:3], *grad_v.stride()[:3], length, length
    rest = {**call.constants, **call.launch_backward}
    kernels.gradients_of_keys[(lists.lines, rows)](
        *given, grad_k, grad_v, *tables, *strides, *call.numbers(lists), SEGMENT=False, **rest
    )
    if len(lists.segments):
        parts = [call.scratch(lists, rows, q.shape[3])[0] for _ in range(2)]
        kernels.gradients_of_keys[(len(lists.segments), rows)](
            *given, *parts, *tables, *strides, *call.numbers(lists), SEGMENT=True, **rest
        )
        for part, grad in zip(parts, (grad_k, grad_v), strict=True):
            kernels.add_segments[(len(lists.long), rows)](
                part, lists.long, grad, *grad.stride()[:3], k.shape[2], H=k.shape[1], **call.shape
            )
    return grad_q, grad_k, grad_v, None


@dataclass(frozen=True)
class _Call:
    """What the kernels are told beside tensors."""

    tiles: TileLists
    scoring: Scoring
    dropout: float
    seed: int
    lengths: tuple[int, int]
    constants: dict
    shape: dict
    launch: dict
    launch_backward: dict

    def tables(self, lists: Lists, masks: Tensor) -> tuple[Tensor, ...]:
        index = self.tiles.group_of  # places are tokens: no index is read
        return (
            self.tiles.group_of,
            lists.offsets,
            lists.masked,
            lists.others,
            lists.masks,
            masks,
            lists.segments,
            index,
            index,
        )

    def numbers(self, lists: Lists) -> tuple[float | int, ...]:
        threshold, boost = int(self.dropout * (1 << 32)), 1 / (1 - self.dropout)
        cap = self.scoring.softcap or 1.0
        return self.scoring.scale, cap, self.seed, threshold, boost, *self.lengths, lists.lines, LIMIT, 0, 0, 1

    def scratch(self, lists: Lists, rows: int, dim: int) -> tuple[Tensor, Tensor]:
        shape = len(lists.segments), rows, self.tiles.size
        make = {"dtype": torch.float32, "device": lists.offsets.device}
        return torch.empty(*shape, dim, **make), torch.empty(shape, **make)


def _call(q: Tensor, k: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float, seed: Tensor | None) -> _Call:
    from .tile_kernels import ALL

    # smaller tiles where the plan's blocks need no masks in them; other blocks are listed anew
    size = plan.block_size if plan.block_size in SMALLER else TILE
    shape = shape_of(q, size)
    constants = {
        "H": q.shape[1], "R": q.shape[1] // k.shape[1], "INDEXED": False, "BY_PLACE": False, "RELATION": ALL.value,
        "HAS_CAP": scoring.softcap is not None, "DROPOUT": dropout > 0, "PRECISION": "ieee", **shape,
    }  # fmt: skip
    tiles = tile_lists(plan, size, q.shape[0], q.shape[1])
    lengths = plan.q_len, plan.kv_len
    number = 0 if seed is None else int(seed)
    return _Call(tiles, scoring, dropout, number, lengths, constants, shape, *launches(q))


def shape_of(q: Tensor, size: int) -> dict:
    """The sides of what the kernels hold; the matrix units take powers of two from 16."""
    return {"S": size, "D": q.shape[3], "BD": max(16, 1 << (q.shape[3] - 1).bit_length())}


def launches(q: Tensor) -> tuple[dict, dict]:
    """Warps and stages of the forward and of the backward kernels."""
    # measured on an H200; more stages than these do not fit its shared memory
    size = q.shape[3] * q.element_size()
    stages = (3, 3) if size <= 128 else (3, 2) if size <= 256 else (2, 1)
    return tuple({"num_warps": 4, "num_stages": number} for number in stages)


def readable(t: Tensor) -> Tensor:
    """Numbers of a token side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def like(t: Tensor) -> Tensor:
    """`[B, H, L, D]` with heads after tokens in memory, as models join them next."""
    return t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)
