"""FlexAttention with block masks taken from the plan's tables: the default on a GPU.

`create_block_mask` would materialise n x n; the plan's tables are compact already. FlexAttention wants them rectangular,
so that one long row (a global query) or column (a sink) would make them (n / block)^2: long rows and columns are split off
as calls of their own and merged by log-sum-exp.

Kernels are compiled for all lengths at once: whatever changes with the length is a tensor, or the shape of one. The numbers of a pattern
are constants of its kernel.

Legend: B, P as in `BlockPlan`; W widest row of a table; i query block, j key block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...plan import BlockPlan, remembered
from ..autograd import AutogradBackend
from ..backend import AttentionCall, Results
from ..devices import HALF_TYPES, generation
from ..merge import merge
from ..scoring import Scoring

# kernels work on 128 x 128 tiles, and lengths that divide by it need no bounds checks; torch chooses those of the backward
# pass by head dim and has none that divide smaller blocks
TILE = 128
# a row of the table is long if it has more than this many times the median's blocks, plus a few
LONG_FACTOR, LONG_LEAST = 4, 16
# patterns and kinds of batch data that may be compiled in one process, before an error says so
MAX_KERNELS = 256
# (compute capability, head dim): measured on an H100 at 65,536 tokens, out of eight forward and eight backward each; at head
# dim 128 torch's own backward was the fastest
OPTIONS = {
    (9, 64): {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32,
        "bwd_num_warps": 4, "bwd_num_stages": 3,
    },
    (9, 128): {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
}  # fmt: skip


class Flex(AutogradBackend):
    """FlexAttention, compiled once for all lengths of a pattern."""

    name = "flex"

    def why_not(self, call: AttentionCall) -> str | None:
        q = call.q
        if call.dropout:
            return "FlexAttention has no dropout of attention weights; use backend='blockwise' or dropout=0"
        if q.device.type != "cuda":
            return f"it needs a GPU and q is on {q.device}: FlexAttention has no backward and no lse elsewhere"
        if q.dtype == torch.float64:
            return "FlexAttention has no float64; use backend='blockwise'"
        if call.blocks.block_size % TILE:
            return f"the plan has blocks of {call.blocks.block_size}; FlexAttention needs a multiple of {TILE}"
        return None

    def forward(self, call: AttentionCall) -> Results:
        plan = call.blocks
        q, k, v = (_pad(t, plan.block_size) for t in (call.q, call.k, call.v))
        found = []
        for piece in pieces(plan):
            of_piece = _gather(q, piece.q_blocks, plan), *(_gather(t, piece.kv_blocks, plan) for t in (k, v))
            out, lse = _call(of_piece, piece, call.scoring.scale, _score_mod(call.scoring, plan, piece))
            found.append(
                (_scatter(out, piece, plan, q, 0.0), _scatter(lse[..., None], piece, plan, q, -torch.inf)[..., 0])
            )
        out, lse = found[0] if len(found) == 1 else merge(found)
        return out[:, :, : plan.q_len], lse[:, :, : plan.q_len]


def _call(inputs: tuple[Tensor, ...], piece: Piece, scale: float, score_mod) -> Results:
    q, k, v = inputs
    # past its limit of recompilations torch would run FlexAttention uncompiled, which is O(n^2); fullgraph makes that an error
    limits: dict[str, Any] = {"recompile_limit": MAX_KERNELS, "accumulated_recompile_limit": 4 * MAX_KERNELS}
    # the numbers of a pattern would otherwise be taken for such as change
    with torch._dynamo.config.patch(**limits, specialize_int=True, specialize_float=True):
        return _compiled()((q, k, v), piece.tables, piece.block_size, (piece.mask_mod, score_mod), scale, _options(q))


def _options(q: Tensor) -> dict[str, int] | None:
    """Sizes of the kernels' tiles where others than torch's own are faster."""
    if q.dtype not in HALF_TYPES:
        return None
    return OPTIONS.get((generation(q.device), q.shape[-1]))


@lru_cache(maxsize=1)
def _compiled():
    return torch.compile(_flex, dynamic=True, fullgraph=True)


def _flex(inputs: tuple[Tensor, ...], tables, block_size: int, mods: tuple, scale: float, options):
    """Out and lse of q, k and v; `mods` are the mask's function and the scores' (None: unchanged).

    The mask is made here, so that its lengths are those of the tensors.
    """
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    (q, k, v), (mask_mod, score_mod) = inputs, mods
    sides, lengths = (block_size, block_size), (q.shape[2], k.shape[2])
    mask = BlockMask(lengths, *tables, BLOCK_SIZE=sides, mask_mod=mask_mod)
    out, aux = flex_attention(
        q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, kernel_options=options,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert aux.lse is not None
    return out, aux.lse


def _pad(t: Tensor, block_size: int) -> Tensor:
    short = -t.shape[2] % block_size
    return torch.nn.functional.pad(t, (0, 0, 0, short)) if short else t.contiguous()


def _tokens(blocks: Tensor, plan: BlockPlan) -> Tensor:
    return (blocks[:, None] * plan.block_size + torch.arange(plan.block_size, device=blocks.device)).flatten()


def _gather(t: Tensor, blocks: Tensor | None, plan: BlockPlan) -> Tensor:
    return t if blocks is None else t.index_select(2, _tokens(blocks, plan))


def _scatter(t: Tensor, piece: Piece, plan: BlockPlan, q: Tensor, fill: float) -> Tensor:
    if piece.q_blocks is None:
        return t
    whole = t.new_full((*t.shape[:2], q.shape[2], t.shape[3]), fill)
    return whole.index_copy(2, _tokens(piece.q_blocks, plan), t)


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of a plan as one FlexAttention call: the tables of a `BlockMask` over the chosen query and key blocks (None: all)."""

    q_blocks: Tensor | None
    kv_blocks: Tensor | None
    tables: tuple[Tensor, ...]
    block_size: int
    mask_mod: Callable


@remembered
def pieces(plan: BlockPlan) -> tuple[Piece, ...]:
    """The plan's blocks, long rows and long columns apart."""
    return tuple(_pieces(plan))


def _pieces(plan: BlockPlan) -> Iterator[Piece]:
    counts = plan.row_offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    group, i, j = row // plan.q_blocks, row % plan.q_blocks, plan.columns.long()
    # the kernels read past the last key (padding) in a full block, so the ragged last block is evaluated instead
    full = plan.full & ((j + 1) * plan.block_size <= plan.kv_len)
    groups = plan.batch_rows * len(plan.patterns)
    long_rows = _long(group, i, groups, plan.q_blocks)
    in_row = _member(i, long_rows, plan.q_blocks)
    long_columns = _long(group[~in_row], j[~in_row], groups, plan.kv_blocks)
    in_column = _member(j, long_columns, plan.kv_blocks) & ~in_row
    rest = ~in_row & ~in_column
    if rest.any() or not len(row):
        yield _piece(plan, group[rest], i[rest], j[rest], full[rest], None, None)
    if in_row.any():
        place = torch.searchsorted(long_rows, i[in_row])
        yield _piece(plan, group[in_row], place, j[in_row], full[in_row], long_rows, None)
    if in_column.any():
        place = torch.searchsorted(long_columns, j[in_column])
        yield _piece(plan, group[in_column], i[in_column], place, full[in_column], None, long_columns)


def _long(group: Tensor, line: Tensor, groups: int, lines: int) -> Tensor:
    """The lines (rows or columns) of the table that are long in any of its groups, ascending."""
    counts = torch.bincount(group * lines + line, minlength=groups * lines).view(groups, lines)
    used = counts[counts > 0]
    limit = LONG_FACTOR * int(used.median()) + LONG_LEAST if len(used) else LONG_LEAST
    return (counts > limit).any(0).nonzero().flatten()


def _member(line: Tensor, chosen: Tensor, lines: int) -> Tensor:
    flags = torch.zeros(lines, dtype=torch.bool, device=line.device)
    flags[chosen] = True
    return flags[line]


def _piece(plan: BlockPlan, group, i, j, full, q_blocks: Tensor | None, kv_blocks: Tensor | None) -> Piece:
    rows = plan.q_blocks if q_blocks is None else len(q_blocks)
    columns = plan.kv_blocks if kv_blocks is None else len(kv_blocks)
    # in the order in which `BlockMask` takes them
    tables = (*_table(plan, group, i, j, full, rows), *_table(plan, group, j, i, full, columns))
    return Piece(q_blocks, kv_blocks, tables, plan.block_size, _mask_mod(plan, q_blocks, kv_blocks))


def _table(plan: BlockPlan, group: Tensor, row: Tensor, column: Tensor, full: Tensor, rows: int) -> list[Tensor]:
    """Partial counts `[B, H, rows]` and indices `[B, H, rows, W]`, then the same of full blocks: all int32.

    Both index tables get one width: torch 2.11 addresses the second with the strides of the first.
    """
    groups = plan.batch_rows * len(plan.patterns)
    line = group * rows + row
    order = (line * (int(column.max()) + 1 if len(column) else 1) + column).argsort()
    line, column, full = line[order], column[order], full[order]
    counts = [torch.bincount(line[kind], minlength=groups * rows) for kind in (~full, full)]
    # of width 1, torch would take it for a constant
    width = max(2, *(int(c.max()) if len(c) else 0 for c in counts))
    out = []
    for kind, count in zip((~full, full), counts, strict=True):
        place = torch.arange(int(count.sum()), device=line.device) - (count.cumsum(0) - count)[line[kind]]
        indices = torch.zeros(groups * rows, width, dtype=torch.int32, device=line.device)
        indices[line[kind], place] = column[kind].int()
        out += [count.int(), indices]
    heads = list(plan.heads) or [0]
    shaped = (t.view(plan.batch_rows, len(plan.patterns), rows, *t.shape[1:]) for t in out)
    return [t[:, heads].contiguous() for t in shaped]


def _mask_mod(plan: BlockPlan, q_blocks: Tensor | None, kv_blocks: Tensor | None) -> Callable:
    size, count = plan.block_size, len(plan.patterns)
    heads = torch.tensor(plan.heads, device=plan.device) if plan.heads else None
    last_q, last_k, length, offset = _numbers(plan, plan.q_len - 1, plan.kv_len - 1, plan.kv_len, plan.q_offset)
    pairs = replace(plan, kv_len=length, q_offset=offset)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = _place(q, q_blocks, size), _place(k, kv_blocks, size)
        exists = (q <= last_q) & (k <= last_k)
        q, k = torch.minimum(q, last_q), torch.minimum(k, last_k)
        if heads is None:
            return exists & pairs.allows(b, 0, q, k)
        allowed = (heads[h] == 0) & pairs.allows(b, 0, q, k)
        for p in range(1, count):
            allowed = allowed | ((heads[h] == p) & pairs.allows(b, p, q, k))
        return exists & allowed

    return mask_mod


@remembered
def _numbers(plan: BlockPlan, *numbers: int) -> tuple[Tensor, ...]:
    """As tensors, which change with the length and compile nothing; they are moved once a plan."""
    return tuple(torch.tensor(number, dtype=torch.int32, device=plan.device) for number in numbers)


def _place(index: Tensor, blocks: Tensor | None, size: int) -> Tensor:
    """Where a token of gathered blocks stands in the whole sequence."""
    return index if blocks is None else blocks[index // size] * size + index % size


def _score_mod(scoring: Scoring, plan: BlockPlan, piece: Piece):
    if scoring.is_plain:
        return None
    cap, bias, size = scoring.softcap, scoring.bias, plan.block_size
    q_blocks, kv_blocks = piece.q_blocks, piece.kv_blocks
    first, last_query, last = _numbers(plan, 0, plan.q_len - 1, 0 if bias is None else bias.shape[1] - 1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias is not None:
            distance = _place(k, kv_blocks, size) - _place(q, q_blocks, size) + last_query
            # padding up to whole blocks is masked, and must not read beside the table
            score = score + bias[h, torch.minimum(torch.maximum(distance, first), last)]
        return score

    return score_mod
