"""From how far back a token hears: what its last state can depend on, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_plan import BlockPlan


def heard(plans: Sequence[BlockPlan], token: int) -> Tensor:
    """Which tokens of a text the last state of `token` can depend on, `[n]` bool.

    A token keeps what it has (residual connections), and heads are taken together. Exact, from the last layer to the first.

    Args:
        plans: of each layer, from the first to the last, of the whole text, batch row 0.
        token: its index.

    Example: `int(heard([build_plan("window(63, 0)", 1024)] * 4, 1023).sum())` is 253, four times 63 tokens back and itself.
    """
    length = plans[0].kv_len
    found = torch.zeros(length, dtype=torch.bool)
    found[token] = True
    # of layers that are alike, queries are asked once
    asked: dict[int, Tensor] = {}
    for plan in reversed(plans):
        if bool(found.all()):
            break
        new = found & ~asked.get(id(plan), torch.zeros_like(found))
        asked[id(plan)] = found
        found = _with_keys(plan, new, found)
    return found


def _with_keys(plan: BlockPlan, queries: Tensor, found: Tensor) -> Tensor:
    """What is found, and the keys that some of the queries see, `[n]` bool."""
    seen = found.clone()
    for row, runs in enumerate(plan.runs[: len(plan.patterns) * plan.q_blocks]):
        p, i = divmod(row, plan.q_blocks)
        q_range = plan.block_range(i, i, plan.q_len)
        asked = queries[slice(*q_range)]
        if not bool(asked.any()):
            continue
        for run in runs:
            if bool(seen[slice(*plan.block_range(run.first, run.last, plan.kv_len))].all()):
                continue
            partial = {block for first, last in run.partial for block in range(first, last + 1)}
            for block in range(run.first, run.last + 1):
                k_range = plan.block_range(block, block, plan.kv_len)
                if block not in partial:
                    seen[slice(*k_range)] = True
                elif not bool(seen[slice(*k_range)].all()):
                    seen[slice(*k_range)] |= plan.mask(0, p, q_range, k_range).cpu()[asked].any(0)
    return seen
