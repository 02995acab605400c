"""flash-attn-4's block-sparse kernels, and the masks of their partial blocks as functions that CuTe compiles.

All that differs from plan to plan comes through tensors: a kernel is compiled for each mask *function*. There are two of them,
since lists go by queries in the forward pass and by keys in the backward pass.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import cutlass.cute as cute  # pyright: ignore[reportMissingImports]
from cutlass import Int32, Uint32  # pyright: ignore[reportMissingImports]
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # pyright: ignore[reportMissingImports]
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # pyright: ignore[reportMissingImports]
from flash_attn.cute.utils import scalar_to_ssa  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ...backend import Given


@cute.jit
def _bit(b, h, line, other, q, k, tables):
    """Whether query `q` sees key `k`, of the blocks `line` and `other`: see `block_lists.Walk`."""
    sizes, groups, lines, starts, words = tables
    place = (groups[b * sizes[0] + h] * sizes[1] + line) * 2
    begin = Uint32(lines[place + 1])
    slot = (begin >> 5) + (Uint32(other) * Uint32(lines[place]) >> (begin & 31))
    word = words[starts[Int32(slot)] + ((q & 127) << 2) + ((k & 127) >> 5)]
    return scalar_to_ssa((word >> (k & 31)) & 1, Int32)


@cute.jit
def by_query(b, h, q, k, seqlen_info, tables):
    return _bit(b[0], h[0], q[0] >> 7, k[0] >> 7, q[0], k[0], tables)


@cute.jit
def by_key(b, h, q, k, seqlen_info, tables):
    return _bit(b[0], h[0], k[0] >> 7, q[0] >> 7, q[0], k[0], tables)


# kernels are known, on disk too, by the text of their mask function, which here is that of the whole file
for function in (by_query, by_key):
    function.__cute_hash__ = function.__name__ + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _lists(walk) -> BlockSparseTensorsTorch:
    return BlockSparseTensorsTorch(*walk.lists, block_size=(128, 128))


def forward(q: Tensor, k: Tensor, v: Tensor, walk, scale: float) -> tuple[Tensor, Tensor]:
    """Out `[B, Q, H, D]` and lse `[B, H, Q]`."""
    return _flash_attn_fwd(
        q, k, v, softmax_scale=scale, return_lse=True, pack_gqa=False, mask_mod=by_query,
        block_sparse_tensors=_lists(walk), aux_tensors=walk.masks,
    )[:2]  # fmt: skip


def backward(q: Tensor, k: Tensor, v: Tensor, given: Given, walk, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return _flash_attn_bwd(
        q, k, v, given.out, given.grad_out, given.lse, softmax_scale=scale, dlse=given.grad_lse, mask_mod=by_key,
        block_sparse_tensors=_lists(walk), aux_tensors=walk.masks,
    )  # fmt: skip
