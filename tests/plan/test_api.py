"""What `build_plan` takes and refuses."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_len": 5, "kv_len": 3}, "5 queries from key index -2 do not lie within 3 keys"),
        ({"q_len": 5, "block_size": 0}, "block_size is 0"),
        ({"q_len": 5, "key_padding_mask": torch.ones(2, 4)}, r"key_padding_mask has shape \(2, 4\).*\[batch, 5\]"),
        ({"q_len": 5, "key_padding_mask": torch.ones(2, 5), "segment_ids": torch.ones(3, 5)}, "batch sizes differ"),
        ({"q_len": 4, "segment_ids": torch.tensor([[0, 1, 0, 0]])}, "row 0 has a document in several pieces"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_plan("window(1, 1)", **arguments)


def test_a_pattern_of_the_wrong_kind_is_refused():
    with pytest.raises(TypeError, match="give a Pattern or its text"):
        build_plan(512, 10)
