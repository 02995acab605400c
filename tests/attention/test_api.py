"""What `sparse_attention` takes and refuses, and patterns and backends that users bring."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"backend": "fast"},
            ValueError,
            "backend is 'fast'; the known ones are 'auto', 'reference', 'blockwise', 'flex', 'fa'",
        ),
        (
            {"backend": "flex"},
            NotImplementedError,
            "backend 'flex' cannot run this call: it needs a GPU and q is on cpu",
        ),
        ({"dropout": 1.0}, ValueError, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"q": torch.zeros(1, 3, 10, 8)}, ValueError, "2 key heads do not divide 3 query heads"),
        ({"q": torch.zeros(4, 10, 8)}, ValueError, "each must be"),
        ({"v": torch.zeros(1, 2, 9, 8)}, ValueError, "must agree"),
        ({"q": torch.zeros(1, 4, 10, 8, dtype=torch.float64)}, ValueError, "must agree"),
        ({"key_padding_mask": torch.ones(1, 9)}, ValueError, r"must be \[batch, 10\]"),
        ({"key_padding_mask": torch.eye(3, 10)}, ValueError, "the batch data has 3 rows; q has 1"),
        ({"key_padding_mask": torch.ones(3, 10)}, ValueError, "the batch data has 3 rows; q has 1"),
        ({"segment_ids": torch.zeros(1, 11)}, ValueError, r"segment_ids has shape \(1, 11\).* must be \[batch, 10\]"),
        ({"marks": torch.zeros(10)}, ValueError, r"marks has shape \(10,\).* must be \[batch, 10\]"),
        ({"pattern": "per_head(first(1), first(2))"}, ValueError, "per_head names 2 patterns; q has 4 heads"),
        ({"pattern": build_plan("first(1)", 9)}, ValueError, "the plan is for 9 queries and 9 keys; q has 10 and k 10"),
        ({"pattern": build_plan("first(1)", 10), "marks": torch.ones(1, 10)}, ValueError, "belong to build_plan"),
        ({"q_offset": 3}, ValueError, "10 queries from key index 3 do not lie within 10 keys"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    given = {
        "q": torch.zeros(1, 4, 10, 8),
        "k": torch.zeros(1, 2, 10, 8),
        "v": torch.zeros(1, 2, 10, 8),
        "pattern": "first(1)",
    }
    given = {**given, **change}
    tensors = [given.pop(name) for name in ("q", "k", "v", "pattern")]
    with pytest.raises(error, match=message):
        sparse_attention(*tensors, **given)
