"""What a token hears through layers, beside products of masks."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.plan.heard import heard
from tests.oracle import dense_mask


@pytest.mark.parametrize("length", [1, 63, 257])
@pytest.mark.parametrize(
    "texts",
    [
        ("window(20, 0)",) * 3,
        ("window(5, 5)", "stride(9) | window(1, 1)", "window(0, 0) | first(2)"),
        ("per_head(window(4, 0), stride(16) & window(None, 0))",) * 2,
    ],
    ids=["window", "mixed", "heads"],
)
def test_heard_is_the_product_of_the_masks(texts, length):
    plans = [build_plan(text, length, block_size=16) for text in texts]
    wanted = torch.eye(length)
    for text in texts:
        step = dense_mask(text, length, length)[0].any(0).float() + torch.eye(length)
        wanted = (step @ wanted > 0).float()
    for token in {0, length // 2, length - 1}:
        assert torch.equal(heard(plans, token), wanted[token].bool())
        # layers that are alike share a plan
        shared = dict(zip(texts, plans, strict=True))
        assert torch.equal(heard([shared[text] for text in texts], token), wanted[token].bool())


def test_windows_add_up():
    assert int(heard([build_plan("window(63, 0)", 1024)] * 4, 1023).sum()) == 253
