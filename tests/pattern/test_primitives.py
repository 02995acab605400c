"""What primitives say of blocks, squares and caches, exactly."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import First, Pattern, Window
from sparse_hf.pattern.base import Marks
from tests.pattern.drawn import states_and_truth


@pytest.mark.parametrize(
    "text",
    [
        "window(5, 0)",
        "first(3)",
        "chunk(7)",
        "chunk(3, 2, 1)",
        "last(2, 7)",
        "stride(3)",
        "outside(window(5, 0))",
        "block_table(4, ((0, 2), (1,)))",
    ],
)
def test_blocks_of_primitives_are_exact(text):
    states, truth = states_and_truth(Pattern.parse(text), 0)
    assert torch.equal(states.long(), truth)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("window(30, 0)", 32 + 2 * 16 - 1),
        ("first(3)", 16),
        ("marked()", 1),
        ("window(None, None)", 1),
        ("stride(7)", 7),
    ],
)
def test_signatures_tell_few_squares_apart(text, kinds):
    q0, k0 = torch.cartesian_prod(torch.arange(100), torch.arange(100)).unbind(1)
    signature = Pattern.parse(text).signature(q0, k0, 16, Marks(length=116))
    assert len(torch.stack([torch.zeros_like(q0), *signature], 1).unique(dim=0)) == kinds


def test_reachable_forgets_what_a_window_left_behind():
    assert not Window(4, 0).reachable(torch.tensor(0), torch.tensor(5))
    assert (Window(4, 0) | First(1)).reachable(torch.tensor(0), torch.tensor(5))
