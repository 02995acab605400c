"""How many keys a query gets at most and at least, where some are chosen from queries and keys."""

from __future__ import annotations

import pytest

from sparse_hf import Pattern
from sparse_hf.analysis import describe
from sparse_hf.plan import most_row_counts

LENGTH = 40
PAST = [q + 1 for q in range(LENGTH)]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("topk(5)", [5] * LENGTH),
        ("topk(5) & window(None, 0)", [min(5, n) for n in PAST]),
        ("(window(3, 0) | topk(5)) & window(None, 0)", [min(9, n) for n in PAST]),
        ("topk(5) & window(2, 0)", [min(3, n) for n in PAST]),
        ("topk_blocks(2, 8) & window(None, 0)", [min(16, n) for n in PAST]),
        ("threshold(0.1) & window(None, 0)", PAST),
        ("lsh(2, 8) & window(None, 0)", PAST),
        ("window(3, 0)", [min(4, n) for n in PAST]),
    ],
)
def test_no_more_is_counted_than_may_be_chosen(text, counts):
    assert most_row_counts(text, LENGTH)[0, 0].tolist() == counts
    # whether the pattern is cut to the past by itself or by who asks
    assert describe(text, LENGTH).pairs == sum(counts)
    assert describe(text, LENGTH).density == pytest.approx(sum(counts) / LENGTH**2)


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("topk(5)", 5),
        ("(window(3, 0) | topk(5)) & window(None, 0)", 5),
        ("topk_blocks(5, 8)", LENGTH),
        ("topk_blocks(4, 8)", 0),
        ("vertical_slash(7, 9)", 7),
        ("topk(5) | topk_blocks(5, 8)", LENGTH + 5),
        ("threshold(0.1)", 0),
        ("lsh(2, 8)", 0),
        ("window(3, 0)", 0),
    ],
)
def test_what_is_surely_chosen(text, least):
    assert Pattern.parse(text).least_chosen(LENGTH) == least
