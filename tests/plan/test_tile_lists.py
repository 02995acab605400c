"""Lists of tiles hold the pairs of their plan, and stay small."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.plan import classify, tile_lists
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.table import PATTERNS, SCENARIOS, scenario

DRAWN = [
    "bigbird(block_size=16) | marked()",
    "(random_blocks(2, 16, 1) | window(3, 3)) & window(40, 9)",
    "random_blocks(2, 40, 7) & random_blocks(2, 24, 1) | last(3)",
    "outside(random_blocks(2, 16, 1)) & window(60, 60)",
    "per_head(bigbird(16, 3, 1, 0), bigbird(16, 3, 1, 1), random_blocks(1, 7, 3))",
]


@pytest.mark.cross
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", [*PATTERNS, *DRAWN])
def test_coarse_squares_and_signatures_lose_no_pair(pattern, case, monkeypatch):
    # the plane is cut from a single square, in sweeps of a few, as those of long texts are
    monkeypatch.setattr(classify, "MAX_FIRST_SQUARES", 1)
    monkeypatch.setattr(classify, "MAX_SQUARES_AT_ONCE", 64)
    # and no two numbers of a signature fit into one
    monkeypatch.setattr(tile_lists, "MAX_NUMBERS", 1)
    batch = scenario(case, 257)
    q_len = batch.pop("q_len")
    expected = oracle.dense_mask(pattern, q_len, 257, **batch)
    plan = build_plan(
        pattern, q_len, key_padding_mask=batch["real"], segment_ids=batch["documents"], marks=batch["marks"],
        kv_len=257, block_size=32,
    )  # fmt: skip
    heads = list(plan.heads) or [0]
    assert torch.equal(plan.to_dense()[:, heads].expand_as(expected), expected)
    tiles = tile_lists.tile_lists(plan, 16, len(expected), len(heads))
    for group, wanted in zip(tiles.group_of.tolist(), expected.flatten(0, 1), strict=True):
        for listed, masks, mask in (
            (tiles.by_query, tiles.masks, wanted),
            (tiles.by_key, tiles.masks_by_key, wanted.T),
        ):
            assert torch.equal(drawn_out(listed, masks, group, mask.shape), mask)


def drawn_out(listed, masks, group: int, shape: tuple[int, int]) -> torch.Tensor:
    """The pairs of a group in the lists of tiles, `[*shape]` bool."""
    side = masks.shape[1]
    pairs = torch.zeros(listed.lines, -(-shape[1] // side), side, side, dtype=torch.bool)
    for line in range(listed.lines):
        row = group * listed.lines + line
        first, last = listed.offsets[row : row + 2].tolist()
        held = torch.ones(last - first, side, side, dtype=torch.bool)
        masked = int(listed.masked[row])
        held[:masked] = masks[listed.masks[first : first + masked].long()].bool()
        pairs[line, listed.others[first:last].long()] = held
    return pairs.transpose(1, 2).flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def test_lists_are_linear_and_masks_few():
    length = 12_928
    with AllocationInterceptor(length) as seen:
        plan = build_plan("window(256, 256) | first(2)", length)
        found = tile_lists.tile_lists(plan, 64, 1, 2)
    assert not seen.quadratic
    # the edges of the window, the column and the row of first(2), and the corner where both are
    assert len(found.masks) <= 12
    assert len(found.by_query.others) == len(found.by_key.others) <= 14 * 202


@pytest.mark.parametrize("pattern", ["bigbird()", "longformer()", "streaming(1024)"])
def test_long_texts_are_planned_in_as_many_steps_as_short_ones(pattern):
    def steps(length: int) -> int:
        with AllocationInterceptor(length) as seen:
            tile_lists.tile_lists(build_plan(pattern, length), 64, 1, 1)
        return seen.calls

    # four times the text is one more size of squares
    assert steps(1 << 18) < steps(1 << 16) + 150 < 900
