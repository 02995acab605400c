"""Tiles of `lsh(...)` hold the pairs of its definition, each once."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.pattern.forms import read_content
from sparse_hf.plan.lsh import hashed_plan
from tests.attention import hashes
from tests.table import scenario

LENGTH = 50


def tensors(q_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randn(2, 4, q_len, 8, generator=torch.Generator().manual_seed(1))
    # keys of very different length, as real ones are
    k = (
        torch.randn(2, 2, LENGTH, 8, generator=torch.Generator().manual_seed(2))
        * torch.linspace(0.2, 3, LENGTH)[:, None]
    )
    return q, k


def planned(text: str, q, k, data: dict):
    form = read_content(text)
    positions = build_plan(
        form.positions, q.shape[2], LENGTH, key_padding_mask=data["real"], segment_ids=data["documents"], block_size=16
    )
    return positions, *hashed_plan(q, k, form.chosen, positions)


@pytest.mark.cross
@pytest.mark.parametrize("case", ["plain", "last_queries", "left_padding", "packed_and_padded"])
@pytest.mark.parametrize("text", hashes.PATTERNS)
def test_each_pair_is_held_once(text, case):
    data = scenario(case, LENGTH)
    q, k = tensors(data["q_len"])
    positions, plan, holds = planned(text, q, k, data)
    found = plan.counts(q.shape[2], LENGTH).view(2, 4, -1, LENGTH) + positions.to_dense().long()
    wanted = hashes.mask_of(text, q, k, data)
    assert torch.equal(found, wanted.long())
    x = torch.arange(8)[:, None, None]
    hashed = holds(x, torch.arange(q.shape[2])[:, None], torch.arange(LENGTH)).view_as(wanted)
    assert torch.equal(hashed | positions.to_dense(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_hashes_alike(dtype):
    text = "lsh(8, 2, 16)"
    q, k = tensors(LENGTH)
    data = scenario("plain", LENGTH)
    right = planned(text, q, k, data)[1].counts(LENGTH, LENGTH)
    with torch.autocast("cpu", dtype):
        found = planned(text, q, k, data)[1].counts(LENGTH, LENGTH)
    assert torch.equal(found, right)
