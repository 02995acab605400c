"""`build_plan`: the plan of a pattern for these lengths and this batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern
from ..pattern.base import as_pattern
from ..pattern.lasting import lasting
from .block_plan import BlockPlan, MaskFunction
from .sequences import find_sequences

BLOCK_SIZE = 128


def build_plan(
    pattern: Pattern | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    q_offset: int | None = None,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    marks: Tensor | None = None,
    mask_function: MaskFunction | None = None,
    block_size: int = BLOCK_SIZE,
    device: torch.device | str | None = None,
) -> BlockPlan:
    """List the non-empty blocks of `pattern` for these lengths and this batch.

    Positions are counted per sequence: position 0 is the first real token of a left-padded row and of each packed
    document, so that packed equals separate and left-padded equals unpadded for every pattern.

    Args:
        pattern: a `Pattern` or its text; `per_head(...)` gives each head its own.
        q_len, kv_len: numbers of queries and keys; `kv_len` defaults to `q_len`.
        q_offset: key index of the first query; by default the queries are the last of the keys (decoding).
        key_padding_mask: `[B, K]`, true on real tokens.
        segment_ids: `[B, K]` integers that number the packed documents.
        marks: `[B, K]`, true on the tokens that `marked()` speaks of.
        mask_function: further `(batch, head, query, key) -> bool` mask on key coordinates, ANDed to the pattern. It is
            opaque, so that every block is evaluated element by element.
        block_size: queries and keys per block.
        device: where the tables live; by default that of the batch data, else the CPU.

    Raises:
        ValueError: lengths or shapes that do not fit together.

    Examples:
        >>> build_plan("window(256, 0) | first(4) & causal()", 1_000_000).q_blocks
        7813
    """
    pattern = as_pattern(pattern)
    kv_len = q_len if kv_len is None else kv_len
    q_offset = _checked_offset(q_len, kv_len, q_offset)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    heads = pattern.heads or (pattern,)
    patterns = tuple(dict.fromkeys(heads))
    if any(p.uses_content for p in patterns):
        raise ValueError(
            f"{pattern} chooses pairs from queries and keys, so that there is no plan of it before they are known; pass the "
            "pattern itself, and a 2-D attention mask"
        )
    asked_marks = marks if any(p.uses_marks for p in patterns) else None
    given = next((t for t in (key_padding_mask, segment_ids, marks) if t is not None), None)
    device = torch.device(device or (given.device if given is not None else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with lasting():
        sequences = find_sequences(kv_len, key_padding_mask, segment_ids, asked_marks)
        # a mask function may look at the batch row, so that rows alike in every other respect may still differ
        batch_rows = given.shape[0] if mask_function is not None and given is not None else sequences.rows
        return BlockPlan(
            patterns=patterns,
            heads=tuple(patterns.index(p) for p in heads) if pattern.heads else (),
            q_len=q_len,
            kv_len=kv_len,
            q_offset=q_offset,
            block_size=block_size,
            batch_rows=batch_rows,
            sequences=sequences.to(device),
            mask_function=mask_function,
            device=device,
        )


def _checked_offset(q_len: int, kv_len: int, q_offset: int | None) -> int:
    if q_len < 0 or kv_len < 0:
        raise ValueError(f"lengths are q_len={q_len}, kv_len={kv_len}; they must not be negative")
    q_offset = kv_len - q_len if q_offset is None else q_offset
    if q_offset < 0 or q_offset + q_len > kv_len:
        raise ValueError(
            f"{q_len} queries from key index {q_offset} do not lie within {kv_len} keys; queries are tokens of the key "
            "sequence (self-attention), so pass q_offset with q_offset + q_len <= kv_len"
        )
    return q_offset
