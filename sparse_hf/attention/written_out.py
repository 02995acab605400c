"""Attention in operations of torch alone, for exporters to ONNX, which know no operator of ours. O(n^2).

Nothing here looks at what a tensor holds. Positions count real tokens, within a document where there are several.

Legend: B batch, H query heads, P distinct patterns, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern.base import Marks, Pattern, as_pattern
from .backend import AttentionCall
from .backends.reference import with_weights


# a graph takes the answer as a constant
@torch.compiler.assume_constant_result
def in_onnx_export() -> bool:
    """Is a model being exported to ONNX? To be asked of traced calls only: it imports the exporter."""
    return torch.onnx.is_in_onnx_export()


def running_max(t: Tensor) -> Tensor:
    """The greatest value of each row so far, `[B, K]`. ONNX has no such operation."""
    if not (torch.compiler.is_compiling() and in_onnx_export()):
        return t.cummax(1).values
    index = torch.arange(t.shape[1], device=t.device)
    return torch.where(index <= index[:, None], t[:, None, :], torch.iinfo(t.dtype).min).amax(2)


def running_min(t: Tensor) -> Tensor:
    """The least value of each row so far, `[B, K]`."""
    return -running_max(-t)


def written_out(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` and lse `[B, H, Q]`.

    Raises:
        NotImplementedError: pairs that are chosen by what queries and keys hold.
    """
    assert call.pattern is not None
    pattern = as_pattern(call.pattern)
    if pattern.uses_content:
        raise NotImplementedError(
            f"{pattern} chooses pairs by what queries and keys hold, which is not exported to ONNX; torch.export keeps it as an "
            "operator of sparse_hf"
        )
    heads = pattern.heads or (pattern,)
    mask = torch.cat([_allowed(call, one) for one in heads], dim=1)  # [B or 1, H or 1, Q, K]
    out, lse, _ = with_weights(call, mask)
    return out, lse


def _allowed(call: AttentionCall, pattern: Pattern) -> Tensor:
    """`[B or 1, 1, Q, K]` bool: which pairs the pattern and the batch hold."""
    padding, segments, marks = call.batch.tensors
    queries, keys = call.q.shape[2], call.k.shape[2]
    index = torch.arange(keys, device=call.q.device)[None]  # [1, K]
    position, length, held = index, keys, None
    if padding is not None and segments is None:
        # [B, K]
        position = padding.long().cumsum(1) - 1
        length = padding.long().sum(1)[:, None, None]
        held = padding[:, None, :] & padding[:, :, None]
    elif segments is not None:
        # [B, K, K]
        held = segments[:, None, :] == segments[:, :, None]
        if padding is not None:
            held = held & padding[:, None, :] & padding[:, :, None]
        earlier = held & (index[:, None, :] < index[:, :, None])
        position, length = earlier.long().sum(2), held.long().sum(2)[:, call.q_offset : call.q_offset + queries, None]
    rows = slice(call.q_offset, call.q_offset + queries)
    flags = Marks(length=length)
    if marks is not None and pattern.uses_marks:
        flags = flags._replace(q=marks[:, rows, None].bool(), k=marks[:, None, :].bool())
    allowed = pattern.allows(position[:, rows, None], position[:, None, :], flags)
    allowed = allowed if held is None else allowed & held[:, rows]
    return allowed.expand(-1, queries, keys)[:, None]
