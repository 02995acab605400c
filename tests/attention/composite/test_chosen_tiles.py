"""Choices of groups of queries in tables of tiles, against the very same choice pair by pair."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.attention.backend import AttentionCall
from sparse_hf.attention.composite.chosen_tiles import ChosenTiles
from sparse_hf.attention.composite.content import held_by
from sparse_hf.attention.dispatch import content_plan
from sparse_hf.attention.dropout import NO_DROPOUT
from sparse_hf.attention.scoring import Scoring
from sparse_hf.pattern.base import as_pattern
from sparse_hf.plan import NOTHING
from tests import oracle
from tests.attention import choices
from tests.attention.exactness import DEVICE, check, compare_choice, tensors

CAUSAL = "(window(20, 0) | first(4) | topk_blocks(3, 32, 'bounds', 16)) & window(None, 0)"
PATTERNS = {
    CAUSAL: ("(window(20, 0) | first(4)) & window(None, 0)", [("bounds", 3, 32, 16)], "window(None, 0)"),
    "window(9, 9) | topk_blocks(3, 16, 'mean', 32)": ("window(9, 9)", [("mean", 3, 16, 32)], "window(None, None)"),
    "topk_blocks(3, 16, 'antidiagonal', 32)": ("first(0)", [("antidiagonal", 3, 16, 32)], "window(None, None)"),
    "topk_blocks(4, 16, 'mean', 16) & window(90, 0)": ("first(0)", [("mean", 4, 16, 16)], "window(90, 0)"),
}


def call_of(text, q, k, v):
    return AttentionCall(
        q, k, v, as_pattern(text), k.shape[2] - q.shape[2], Scoring(q.shape[-1] ** -0.5), NO_DROPOUT, NOTHING
    )


def mask_of(text, q, k):
    nothing = {"real": None, "documents": None}
    known = choices.PATTERNS
    choices.PATTERNS = PATTERNS
    try:
        return choices.mask_of(text, q, k, nothing)
    finally:
        choices.PATTERNS = known


@pytest.mark.cross
@pytest.mark.parametrize("queries", [150, 54])
@pytest.mark.parametrize("text", PATTERNS)
def test_tiles_hold_what_the_definition_says(text, queries):
    q, k, v = tensors((4, 2, 16), queries, 150, torch.float64)
    call = call_of(text, q, k, v)
    plan = content_plan(call)
    # queries that begin within a tile choose key by key
    assert (plan.joined is None) == bool((150 - queries) % 16)
    wanted = mask_of(text, q, k)
    assert torch.equal(held_by(plan, call, torch.arange(queries)), wanted)
    if plan.joined is not None:
        assert torch.equal(plan.joined.to_dense(), wanted)


@pytest.mark.cross
@pytest.mark.parametrize("backend", ["auto", "blockwise", "reference"])
@pytest.mark.parametrize("text", PATTERNS)
def test_equals_dense_attention(text, backend):
    given = tensors((4, 2, 16), 150, 150, torch.float64)
    mask = mask_of(text, *given[:2])
    right = oracle.gradients(lambda *t: oracle.attention(*t, mask), *given)
    ours = oracle.gradients(lambda *t: sparse_attention(*t, text, return_lse=True, backend=backend), *given)
    check(right, right, ours, torch.float64)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("text", PATTERNS)
def test_kernels(text):
    given = tensors((2, 1, 16), 90, 90, torch.float32)
    plan = content_plan(call_of(text, *(t.to(DEVICE) for t in given)))
    assert isinstance(plan.joined, ChosenTiles)
    mask = mask_of(text, *given[:2])
    compare_choice(text, given, mask, torch.float32, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_on_a_gpu(dtype):
    text = "(window(127, 0) | topk_blocks(4, 128, 'bounds', 128)) & window(None, 0)"
    given = tensors((8, 2, 64), 1500, 1500, dtype, "cuda")
    call = call_of(text, *given)
    mask = held_by(content_plan(call), call, torch.arange(1500, device="cuda")).cpu()
    compare_choice(text, given, mask, dtype)
