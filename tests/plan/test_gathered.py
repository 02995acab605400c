"""Marked tokens that are gathered side by side."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.plan import stages
from tests import oracle
from tests.table import PATTERNS, SCENARIOS, scenario


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if "marked" in p] + ["(window(4, 4) | marked()) & window(None, 0)"]
)
def test_gathered_tokens_hold_each_pair_once(pattern, case):
    batch = scenario(case, 257)
    q_len = batch.pop("q_len")
    expected = oracle.dense_mask(pattern, q_len, 257, **batch)[:, 0].int()
    given = {"key_padding_mask": batch["real"], "segment_ids": batch["documents"], "marks": batch["marks"]}
    plan = build_plan(pattern, q_len, 257, **given, block_size=16)
    first, *others = stages(plan)
    found = sum(pairs(piece, len(expected), q_len) for piece in first.pieces)
    for stage in others:
        marked = batch["marks"][:, plan.q_offset :, None]
        found = torch.where(marked, sum(pairs(piece, len(expected), q_len) for piece in stage.pieces), found)
    assert torch.equal(found.expand_as(expected), expected)


def pairs(piece, batch: int, q_len: int) -> torch.Tensor:
    """How often the tiles of a piece of a plan hold each pair, `[batch, q_len, 257]`."""
    found = torch.zeros(batch, q_len, 257, dtype=torch.int32)
    for b in range(batch):
        row = b if piece.batch_rows > 1 else 0
        for i, runs in enumerate(piece.runs[row * piece.q_blocks : (row + 1) * piece.q_blocks]):
            q_range = piece.block_range(i, i, piece.q_len)
            for run in runs:
                k_range = piece.block_range(run.first, run.last, piece.kv_len)
                mask = torch.ones(q_range[1] - q_range[0], k_range[1] - k_range[0], dtype=torch.int32)
                for part in run.partial:
                    c0, c1 = piece.block_range(*part, piece.kv_len)
                    mask[:, c0 - k_range[0] : c1 - k_range[0]] = piece.mask(row, 0, q_range, (c0, c1)).int()
                q, k = piece.query_index(row, *q_range), piece.key_index(row, *k_range)
                found[b, q[:, None], k] += torch.where((q >= 0)[:, None] & (k >= 0), mask, 0)
    return found
