"""Plans hold the pairs of their pattern."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.plan import block_plan
from tests import oracle
from tests.table import PATTERNS, SCENARIOS, causal_form, scenario


@pytest.mark.cross("pattern", ("causal", "case"))
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tables_hold_the_pairs_of_the_pattern(pattern, causal, case):
    pattern = causal_form(pattern) if causal else pattern
    for length in (1, 63, 100, 257):
        batch = scenario(case, length)
        q_len = batch.pop("q_len")
        expected = oracle.dense_mask(pattern, q_len, length, **batch)
        for block_size in (16, 128):
            plan = build_plan(
                pattern, q_len, length, key_padding_mask=batch["real"], segment_ids=batch["documents"],
                marks=batch["marks"], block_size=block_size,
            )  # fmt: skip
            heads = list(plan.heads) or [0]
            found = plan.to_dense()[:, heads].expand(expected.shape[0], -1, -1, -1)
            assert torch.equal(found, expected.expand_as(found))
            assert torch.equal(plan.row_counts(), plan.to_dense().sum(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_gpu_makes_the_same_tables(pattern, case, monkeypatch):
    batch = scenario(case, 257)
    q_len = batch.pop("q_len")
    given = {"key_padding_mask": batch["real"], "segment_ids": batch["documents"], "marks": batch["marks"]}
    right = build_plan(pattern, q_len, 257, block_size=16, **given)
    monkeypatch.setattr(block_plan, "MAX_BLOCKS_LISTED_BY_CPU", 0)
    given = {name: None if t is None else t.cuda() for name, t in given.items()}
    found = build_plan(pattern, q_len, 257, block_size=16, device="cuda", **given)
    for name in ("row_offsets", "columns", "full"):
        assert getattr(found, name).is_cuda and torch.equal(getattr(found, name).cpu(), getattr(right, name)), name


def test_tables_are_made_where_they_should_be_whatever_the_default_device_is():
    right = build_plan("bigbird(block_size=16)", 257)
    with torch.device("meta"):
        found = build_plan("bigbird(block_size=16)", 257)
        assert torch.equal(found.columns, right.columns)


def test_density_and_pairs_count_the_pattern():
    plan = build_plan("window(None, 0)", 1000)
    assert plan.pairs == 1000 * 1001 // 2 and plan.density == pytest.approx(0.5005)
