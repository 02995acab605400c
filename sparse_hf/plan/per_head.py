"""Query blocks that all heads can compute together although each has a pattern of its own, as with random blocks.

Legend: B batch rows, H heads, P patterns, Nq query blocks, L most key blocks of any row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_plan import BlockPlan
from .cache import remembered

# rows with more key blocks are done head by head: beside a row that sees everything, others would be padded to it
MAX_BLOCKS = 32


@remembered
def joined_rows(plan: BlockPlan) -> list[dict[int, Tensor]]:
    """Per batch row of the table, query block -> the key blocks of each head, `[H, L]` int64, -1 beyond their number.

    They are the rows that hold full blocks only, for every head.
    """
    if not plan.heads:
        return [{} for _ in range(plan.batch_rows)]
    shape = plan.batch_rows, len(plan.patterns), plan.q_blocks
    offsets, columns, full = (t.cpu() for t in (plan.row_offsets, plan.columns, plan.full))
    counts = offsets.diff().view(shape)
    partial = torch.nn.functional.pad((~full).cumsum(0), (1, 0))[offsets].diff().view(shape)
    joined = ((partial == 0) & (counts > 0) & (counts <= MAX_BLOCKS)).all(1)  # [B, Nq]
    most = int(counts.mul(joined[:, None]).max()) if joined.any() else 0
    place = offsets[:-1, None] + torch.arange(most)
    listed = columns[place.clamp(max=max(0, len(columns) - 1))].long() if most else torch.zeros_like(place)
    listed = listed.where(torch.arange(most) < counts.view(-1, 1), -1).view(*shape, most)[:, list(plan.heads)]
    return [
        {
            i: listed[b, :, i, : int(counts[b, :, i].max())].to(plan.device)
            for i in joined[b].nonzero().flatten().tolist()
        }
        for b in range(plan.batch_rows)
    ]
