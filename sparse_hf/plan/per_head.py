"""Heads with patterns of their own: a plan for the heads of each, and what all heads can compute together.

Legend: B batch rows, H heads, P patterns, Nq query blocks, L most key blocks of any query block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_plan import BlockPlan
from .cache import remembered
from .strided import Regrouped

# key blocks of a query block beyond which it is computed head by head: others would be padded to one that sees everything
MAX_JOINED_BLOCKS = 32


@dataclass(frozen=True, eq=False)
class ByHeads:
    """Patterns per head of which some are regrouped: a plan for the heads that share one."""

    heads: tuple[int, ...]
    plans: tuple[BlockPlan | Regrouped, ...]

    @property
    def batch_rows(self) -> int:
        return max(plan.batch_rows for plan in self.plans)

    @property
    def q_len(self) -> int:
        return self.plans[0].q_len

    @property
    def kv_len(self) -> int:
        return self.plans[0].kv_len

    @property
    def q_offset(self) -> int:
        return self.plans[0].q_offset

    @property
    def device(self) -> torch.device:
        return self.plans[0].device


AnyPlan = BlockPlan | Regrouped | ByHeads


@remembered
def joined_rows(plan: BlockPlan) -> list[dict[int, Tensor]]:
    """Per batch row of the plan, query block -> the key blocks of each head, `[H, L]` int64, -1 beyond their number.

    They are the query blocks that hold full blocks only, for every head: all heads can compute them together although each
    has a pattern of its own, as with random blocks.
    """
    if not plan.heads:
        return [{} for _ in range(plan.batch_rows)]
    shape = plan.batch_rows, len(plan.patterns), plan.q_blocks
    offsets, columns, full = (t.cpu() for t in (plan.row_offsets, plan.columns, plan.full))
    counts = offsets.diff().view(shape)
    partial = torch.nn.functional.pad((~full).cumsum(0), (1, 0))[offsets].diff().view(shape)
    joined = ((partial == 0) & (counts > 0) & (counts <= MAX_JOINED_BLOCKS)).all(1)  # [B, Nq]
    most = int(counts.mul(joined[:, None]).max()) if joined.any() else 0
    step = torch.arange(most, device="cpu")
    entry = offsets[:-1, None] + step
    listed = columns[entry.clamp(max=max(0, len(columns) - 1))].long() if most else torch.zeros_like(entry)
    listed = listed.where(step < counts.view(-1, 1), -1).view(*shape, most)[:, list(plan.heads)]
    return [
        {
            i: listed[b, :, i, : int(counts[b, :, i].max())].to(plan.device)
            for i in joined[b].nonzero().flatten().tolist()
        }
        for b in range(plan.batch_rows)
    ]
