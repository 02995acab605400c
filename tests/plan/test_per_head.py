"""Heads with patterns of their own."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparse_hf import build_plan
from sparse_hf.plan import joined_rows


def test_joined_rows_hold_the_full_blocks_of_every_head():
    plan = build_plan(
        "per_head(chunk(16, 1, 1) | random_blocks(2, 16, 0), chunk(16) | window(3, 0), chunk(16, 1, 1) | random_blocks(2, 16, 0))",
        250, key_padding_mask=torch.arange(250) < torch.tensor([[250], [170]]), block_size=16,
    )  # fmt: skip
    joined = joined_rows(plan)
    # the window's blocks are partial but for the first row
    assert [list(blocks) for blocks in joined] == [[0], [0]]
    plan = replace(plan, patterns=(plan.patterns[0], plan.patterns[0].parts[0]))
    joined, dense = joined_rows(plan), plan.to_dense()
    # the last block is short and full; a block that is padding in part is not
    assert list(joined[0]) == list(range(16)) and list(joined[1]) == list(range(9))
    for b, rows in enumerate(joined):
        for i, blocks in rows.items():
            for h, own in enumerate(blocks):
                found = torch.zeros(plan.kv_blocks * 16, dtype=torch.bool).view(-1, 16)
                found[own[own >= 0]] = True
                wanted = dense[b, plan.heads[h], i * 16 : (i + 1) * 16]
                assert torch.equal(found.flatten()[:250].expand_as(wanted), wanted)
