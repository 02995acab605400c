"""Plans hold the pairs of their pattern, in tables that stay small."""

from __future__ import annotations

import threading
import time
import tracemalloc
from dataclasses import replace

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.plan import block_plan, calls, joined_rows, made_apart, remembered
from sparse_hf.plan import classify as build
from sparse_hf.plan import tile_lists as lists
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.table import PATTERNS, SCENARIOS, causal_form, scenario


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
    monkeypatch.setattr(block_plan, "MANY", 0)
    given = {name: None if t is None else t.cuda() for name, t in given.items()}
    found = build_plan(pattern, q_len, 257, block_size=16, device="cuda", **given)
    for name in ("row_offsets", "columns", "full"):
        assert getattr(found, name).is_cuda and torch.equal(getattr(found, name).cpu(), getattr(right, name)), name


def test_tables_are_made_where_they_should_be_whatever_the_default_device_is():
    right = build_plan("bigbird(block_size=16)", 257)
    with torch.device("meta"):
        found = build_plan("bigbird(block_size=16)", 257)
        assert torch.equal(found.columns, right.columns)


DRAWN = [
    "bigbird(block_size=16) | marked()",
    "(random_blocks(2, 16, 1) | window(3, 3)) & window(40, 9)",
    "random_blocks(2, 40, 7) & random_blocks(2, 24, 1) | last(3)",
    "outside(random_blocks(2, 16, 1)) & window(60, 60)",
    "per_head(bigbird(16, 3, 1, 0), bigbird(16, 3, 1, 1), random_blocks(1, 7, 3))",
]


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", [*PATTERNS, *DRAWN])
def test_coarse_squares_and_signatures_lose_no_pair(pattern, case, monkeypatch):
    # the plane is cut from a single square, in sweeps of a few, as those of long texts are
    monkeypatch.setattr(build, "FEW", 1)
    monkeypatch.setattr(build, "SWEEP", 64)
    # and no two numbers of a signature fit into one
    monkeypatch.setattr(lists, "MOST", 1)
    batch = scenario(case, 257)
    q_len = batch.pop("q_len")
    expected = oracle.dense_mask(pattern, q_len, 257, **batch)
    plan = build_plan(
        pattern, q_len, key_padding_mask=batch["real"], segment_ids=batch["documents"], marks=batch["marks"],
        kv_len=257, block_size=32,
    )  # fmt: skip
    heads = list(plan.heads) or [0]
    assert torch.equal(plan.to_dense()[:, heads].expand_as(expected), expected)
    tiles = lists.tile_lists(plan, 16, len(expected), len(heads))
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


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if "marked" in p] + ["(window(4, 4) | marked()) & window(None, 0)"]
)
def test_gathered_tokens_hold_each_pair_once(pattern, case):
    batch = scenario(case, 257)
    q_len = batch.pop("q_len")
    expected = oracle.dense_mask(pattern, q_len, 257, **batch)[:, 0].int()
    given = {"key_padding_mask": batch["real"], "segment_ids": batch["documents"], "marks": batch["marks"]}
    plan = build_plan(pattern, q_len, 257, **given, block_size=16)
    first, *others = calls(plan)
    found = sum(pairs(piece, len(expected), q_len) for piece in first.pieces)
    for call in others:
        marked = batch["marks"][:, plan.q_offset :, None]
        found = torch.where(marked, sum(pairs(piece, len(expected), q_len) for piece in call.pieces), found)
    assert torch.equal(found.expand_as(expected), expected)


def test_joined_rows_hold_the_full_blocks_of_every_head():
    plan = build_plan(
        "per_head(chunk(16, 1, 1) | random_blocks(2, 16, 0), chunk(16) | window(3, 0), chunk(16, 1, 1) | random_blocks(2, 16, 0))",
        250, key_padding_mask=torch.arange(250) < torch.tensor([[250], [170]]), block_size=16,
    )  # fmt: skip
    joined = joined_rows(plan)
    # the window's blocks are partial but for the first row
    assert [list(blocks) for blocks in joined] == [[0], [0]]
    plan = replace(plan, patterns=(plan.patterns[0], plan.patterns[0].parts[0]))
    joined, dense = joined_rows(plan), plan.to_dense()
    # the last block is short and full; a block that is padding in part is not
    assert list(joined[0]) == list(range(16)) and list(joined[1]) == list(range(9))
    for b, rows in enumerate(joined):
        for i, blocks in rows.items():
            for h, own in enumerate(blocks):
                found = torch.zeros(plan.kv_blocks * 16, dtype=torch.bool).view(-1, 16)
                found[own[own >= 0]] = True
                wanted = dense[b, plan.heads[h], i * 16 : (i + 1) * 16]
                assert torch.equal(found.flatten()[:250].expand_as(wanted), wanted)


def pairs(piece, batch: int, q_len: int) -> torch.Tensor:
    """How often the tiles of a piece of a plan hold each pair, `[batch, q_len, 257]`."""
    found = torch.zeros(batch, q_len, 257, dtype=torch.int32)
    for b in range(batch):
        row = b if piece.batch_rows > 1 else 0
        for i, runs in enumerate(piece.runs[row * piece.q_blocks : (row + 1) * piece.q_blocks]):
            q_range = piece.block_range(i, i, piece.q_len)
            for run in runs:
                k_range = piece.block_range(run.first, run.last, piece.kv_len)
                mask = torch.ones(q_range[1] - q_range[0], k_range[1] - k_range[0], dtype=torch.int32)
                for part in run.partial:
                    c0, c1 = piece.block_range(*part, piece.kv_len)
                    mask[:, c0 - k_range[0] : c1 - k_range[0]] = piece.mask(row, 0, q_range, (c0, c1)).int()
                q, k = piece.query_places(row, *q_range), piece.key_places(row, *k_range)
                found[b, q[:, None], k] += torch.where((q >= 0)[:, None] & (k >= 0), mask, 0)
    return found


def test_a_million_tokens_are_planned_in_no_time():
    tracemalloc.start()
    begin = time.process_time()
    plan = build_plan("window(512, 0) | first(4)", 1_000_000)
    taken = time.process_time() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tables = sum(t.numel() * t.element_size() for t in (plan.row_offsets, plan.columns, plan.full))
    # a generous bound: the figure itself is in docs/results
    assert taken < 20 and peak < 200e6 and tables < 2e6
    assert len(plan.columns) < 8 * plan.q_blocks


@pytest.mark.parametrize("pattern", ["bigbird()", "longformer()", "streaming(1024)"])
def test_long_texts_are_planned_in_as_many_steps_as_short_ones(pattern):
    def steps(length: int) -> int:
        with AllocationInterceptor(length) as seen:
            lists.tile_lists(build_plan(pattern, length), 64, 1, 1)
        return seen.calls

    # four times the text is one more size of squares
    assert steps(1 << 18) < steps(1 << 16) + 150 < 900


def test_rows_that_are_alike_share_one_plan():
    alike = torch.ones(8, 300, dtype=torch.bool)
    alike[:, 200:] = False
    assert build_plan("window(9, 9)", 300, key_padding_mask=alike).batch_rows == 1
    assert build_plan("window(9, 9)", 300, key_padding_mask=torch.ones(8, 300)).layout.real is None
    alike[3, 150:] = False
    assert build_plan("window(9, 9)", 300, key_padding_mask=alike).batch_rows == 8
    marks = torch.rand(8, 300) < 0.1
    assert build_plan("window(9, 9)", 300, marks=marks).batch_rows == 1


def test_density_and_pairs_count_the_pattern():
    plan = build_plan("window(None, 0)", 1000)
    assert plan.pairs == 1000 * 1001 // 2 and plan.density == pytest.approx(0.5005)


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


def test_tables_may_be_made_by_another_thread():
    @remembered
    def maker(plan):
        return threading.get_ident()

    here = build_plan("window(3, 0)", 10)
    assert maker(here) == threading.get_ident()
    with made_apart(True):
        there = build_plan("window(3, 0)", 10)
        assert maker(there) == maker(there) != threading.get_ident()
        # what is made there asks for more without a thread of its own
        assert lists.tile_lists(there, 32, 1, 1).by_query.lines == 1
    assert maker(build_plan("window(3, 0)", 10)) == threading.get_ident()
