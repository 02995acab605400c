"""What a batch adds: where sequences begin and end, padding, marks."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.plan import find_sequences
from tests import oracle
from tests.table import SCENARIOS, scenario


def test_rows_that_are_alike_share_one_plan():
    alike = torch.ones(8, 300, dtype=torch.bool)
    alike[:, 200:] = False
    assert build_plan("window(9, 9)", 300, key_padding_mask=alike).batch_rows == 1
    assert build_plan("window(9, 9)", 300, key_padding_mask=torch.ones(8, 300)).sequences.real is None
    alike[3, 150:] = False
    assert build_plan("window(9, 9)", 300, key_padding_mask=alike).batch_rows == 8
    marks = torch.rand(8, 300) < 0.1
    assert build_plan("window(9, 9)", 300, marks=marks).batch_rows == 1


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("case", SCENARIOS)
def test_positions_are_those_of_counting(case, length):
    batch = scenario(case, length)
    found = find_sequences(length, batch["real"], batch["documents"], batch["marks"])
    real = torch.ones(2, length, dtype=torch.bool) if batch["real"] is None else batch["real"]
    documents = torch.zeros(2, length, dtype=torch.long) if batch["documents"] is None else batch["documents"]
    if found.start is None:
        assert real.all() and found.real is None and (documents == documents[:, :1]).all()
        return
    position = torch.arange(length) - found.start.expand(2, -1)
    assert torch.equal(position[real], oracle.positions(real, documents)[real])
    for b in range(2):
        for x in real[b].nonzero().flatten().tolist():
            own = (real[b] & (documents[b] == documents[b, x])).nonzero().flatten()
            assert found.end.expand(2, -1)[b, x] == own[-1]
