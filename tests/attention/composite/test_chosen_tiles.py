"""Choices of groups of queries in tables of tiles, against the very same choice pair by pair."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_hf import sparse_attention
from sparse_hf.attention.backend import AttentionCall
from sparse_hf.attention.composite import chosen_lists
from sparse_hf.attention.composite.chosen_blocks import Blocks
from sparse_hf.attention.composite.chosen_rest import find_rest
from sparse_hf.attention.composite.chosen_tiles import ChosenTiles
from sparse_hf.attention.composite.content import held_by
from sparse_hf.attention.dispatch import content_plan
from sparse_hf.attention.dropout import NO_DROPOUT
from sparse_hf.attention.scoring import Scoring
from sparse_hf.pattern.base import as_pattern
from sparse_hf.plan import NOTHING, PlanKey, find_plan, tile_lists
from tests import oracle
from tests.attention import choices
from tests.attention.exactness import DEVICE, check, compare_choice, tensors
from tests.crosses import sampled
from tests.plan.test_tile_lists import drawn_out

CAUSAL = "(window(20, 0) | first(4) | topk_blocks(3, 32, 'bounds', 16)) & window(None, 0)"
PATTERNS = {
    CAUSAL: ("(window(20, 0) | first(4)) & window(None, 0)", [("bounds", 3, 32, 16)], "window(None, 0)"),
    "window(9, 9) | topk_blocks(3, 16, 'mean', 32)": ("window(9, 9)", [("mean", 3, 16, 32)], "window(None, None)"),
    "topk_blocks(3, 16, 'antidiagonal', 32)": ("first(0)", [("antidiagonal", 3, 16, 32)], "window(None, None)"),
    "topk_blocks(3, 16, 'bounds', 16, 'group') & window(None, 0)": (
        "first(0)",
        [("bounds", 3, 16, 16, "group")],
        "window(None, 0)",
    ),
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
        assert torch.equal(plan.joined.to_dense()[:, list(plan.joined.heads)], wanted)


@pytest.mark.cross
@pytest.mark.parametrize("backend", ["auto", "blockwise", "reference"])
@pytest.mark.parametrize("text", PATTERNS)
def test_equals_dense_attention(text, backend):
    given = tensors((4, 2, 16), 150, 150, torch.float64)
    mask = mask_of(text, *given[:2])
    right = oracle.gradients(lambda *t: oracle.attention(*t, mask), *given)
    ours = oracle.gradients(lambda *t: sparse_attention(*t, text, return_lse=True, backend=backend), *given)
    check(right, right, ours, torch.float64)


LISTED = {
    **dict.fromkeys(PATTERNS, 150),
    # groups that begin before the first query, and blocks and groups of several tiles
    "(window(3, 0) | topk_blocks(2, 64, 'mean', 128)) & window(None, 0)": 416,
    "(chunk(64) | topk_blocks(3, 128, 'mean', 64)) & window(300, 0)": 700,
    "(last(1, 32) | topk_blocks(2, 16, 'mean', 16)) & stride(3)": 150,
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("text", "length"), LISTED.items())
def test_lists_are_those_of_tables(text, length):
    queries = length - 64 if length == 416 else length
    q, k, v = (t.to(DEVICE) for t in tensors((2, 1, 16), queries, length, torch.float32))
    plan = content_plan(call_of(text, q, k, v)).joined
    assert plan is not None
    tiles, wanted = plan.own_lists(plan.block_size), plan.to_dense().cpu()
    assert tiles is not None
    assert tiles.group_of.tolist() == [b * len(plan.patterns) + h for b in range(len(q)) for h in plan.heads]
    for group, mask in enumerate(wanted.flatten(0, 1)):
        for listed, masks, one in (
            (tiles.by_query, tiles.masks, mask),
            (tiles.by_key, tiles.masks_by_key, mask.T),
        ):
            assert torch.equal(drawn_out(listed, masks, group, one.shape), one)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("size", [16, 100])
def test_blocks_are_pooled_as_they_are_without_kernels(size, monkeypatch):
    (t, _, _), found = tensors((3, 1, 20), 150, 150, torch.float32, DEVICE), []
    positions = find_plan(PlanKey(as_pattern("window(9, 0)"), 150, 150, 0, t.device), NOTHING)
    blocks = Blocks(find_rest(positions, None, 2), size)
    for able in (True, False):
        monkeypatch.setattr(Blocks, "_are_pooled_by_kernel", lambda *_, able=able: able)
        found.append([blocks.mean(t), blocks.mean(t, sides=True), blocks.bounds(t)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("interpreted")
def test_long_lines_of_keys_are_cut(monkeypatch):
    given = [t.to(DEVICE) for t in tensors((2, 1, 16), 200, 200, torch.float32)]
    plan = content_plan(call_of(CAUSAL, *given)).joined
    assert plan is not None
    monkeypatch.setattr(tile_lists, "HOST_BOUND_TILES", 0)
    monkeypatch.setattr(tile_lists, "PROGRAM_TILES", 2)
    monkeypatch.setattr(chosen_lists, "MAX_WHOLE_LINE", 8)
    assert not plan.own_lists(16).by_query.cut and plan.own_lists(16).by_key.cut > 0


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("limit", ["MAX_TILES", "MAX_CUT", "MAX_MASKS"])
def test_large_planes_are_listed_from_tables(limit, monkeypatch):
    given = [t.to(DEVICE) for t in tensors((2, 1, 16), 150, 150, torch.float32)]
    monkeypatch.setattr(chosen_lists, limit, 1)
    plan = content_plan(call_of(CAUSAL, *given)).joined
    assert plan is not None and plan.own_lists(16) is None
    tiles, wanted = tile_lists.tile_lists(plan, 16, *given[0].shape[:2]), plan.to_dense().cpu()
    assert torch.equal(drawn_out(tiles.by_query, tiles.masks, 3, wanted[1, 1].shape), wanted[1, 1])


@pytest.mark.usefixtures("interpreted")
def test_another_choice_of_the_same_lengths_takes_few_steps_and_reads_nothing():
    def planned():
        q, k, v = (torch.randn(1, h, 256, 16, device=DEVICE) for h in (2, 1, 1))
        plan = content_plan(call_of(CAUSAL, q, k, v)).joined
        assert plan is not None
        plan.own_lists(16)

    planned()
    with Operations() as seen:
        planned()
    assert not seen.waits and len(seen.names) < 250


class Operations(TorchDispatchMode):
    """What torch is asked to do, and which of it a host waits for."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    @property
    def waits(self) -> list[str]:
        return [
            name for name in self.names if any(one in name for one in ("_local_scalar", "nonzero", "unique", "item"))
        ]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("text", sampled(list(PATTERNS)[::2], PATTERNS))
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


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1500, 20_000])
def test_a_gpu_lists_what_its_tables_say(length):
    text = "(window(127, 0) | topk_blocks(4, 128, 'bounds', 128)) & window(None, 0)"
    given = tensors((4, 2, 64), length, length, torch.bfloat16, "cuda")
    found = []
    for able in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not able:
                patch.setattr(chosen_lists, "MAX_TILES", 0)
                chosen_lists.PLANES.clear()
            found.append(oracle.gradients(lambda *t: sparse_attention(*t, text, return_lse=True), *given))
    chosen_lists.PLANES.clear()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.fixture
def waits_fail():
    """Have torch raise where a host waits for a GPU."""
    with warnings.catch_warnings():
        # that it may miss some
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        try:
            yield lambda: torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_host_waits_for_a_choice(waits_fail):
    given = tensors((4, 2, 64), 1500, 1500, torch.bfloat16, "cuda")
    text = "(window(127, 0) | topk_blocks(4, 128, 'bounds', 128)) & window(None, 0)"
    grad = torch.zeros_like(given[0])

    def step():
        leaves = [t.clone().requires_grad_() for t in given]
        torch.autograd.grad(sparse_attention(*leaves, text), leaves, grad)

    step()
    torch.cuda.synchronize()
    waits_fail()
    step()
