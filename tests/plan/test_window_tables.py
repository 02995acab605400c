"""A plan as a window and global tokens: each pair once, or the reason why it is none."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf import Pattern, build_plan
from sparse_hf.plan import Split, split
from tests.table import SCENARIOS, causal_form, scenario

PATTERNS = [
    "window(None, None)",
    "window(20, 20)",
    "window(40, 0)",
    "window(None, 3)",
    "first(3)",
    "window(16, 16) | first(2)",
    "window(30, 5) | marked()",
    "first(2) | marked() | window(9, 0)",
    "window(30, 5) | marked_keys()",
    "first(2) & window(None, 0) | marked_keys() & window(None, 0) | window(9, 0)",
    "window(20, 20) & window(3, None) | window(1, 7) | first(5)",
    "longformer(attention_window=32)",
    "streaming(window=32, sinks=4)",
    "first(4) & window(30, 0) | window(5, 0)",
]


def plan_of(pattern: str, length: int, case: str, batch: int = 2):
    data = scenario(case, length, batch)
    q_len = data.pop("q_len")
    plan = build_plan(
        pattern, q_len, length, key_padding_mask=data["real"], segment_ids=data["documents"], marks=data["marks"]
    )
    return plan, q_len, data


def pairs_of(found: Split) -> torch.Tensor:
    """How often the three pieces hold each pair, `[B, Q, K]`, from the tables alone."""
    counts = torch.zeros(found.batch, found.q_len, found.kv_len, dtype=torch.long)
    rows = set(found.rows.tolist())
    window, clip = found.form.window, found.form.clip
    for (b, q0, q1, k0, k1), columns in zip(found.sequences.tolist(), found.columns.tolist(), strict=True):
        for i in range(q0, q1):
            if b * found.q_len + i in rows:
                counts[b, i, k0:k1] += 1
                continue
            x = torch.tensor(i + found.q_offset)
            keys = torch.arange(k0, k1)
            # kernels take the last query to stand at the last key
            assert window is None or q1 + found.q_offset == k1
            inside = torch.zeros_like(keys, dtype=torch.bool) if window is None else window.allows(x, keys)
            counts[b, i, k0:k1] += inside
            for key in columns:
                if key >= 0 and clip.allows(x, torch.tensor(key)) and not inside[key - k0]:
                    counts[b, i, key] += 1
    return counts


@pytest.mark.cross
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_hold_each_pair_once(pattern, case):
    for text in (pattern, causal_form(pattern)):
        plan, _, _ = plan_of(text, 63, case)
        found = split(plan, 2)
        if isinstance(found, str):
            # rows of marked queries that see the past only
            assert "marked" in text and "must see everything" in found
            continue
        assert torch.equal(pairs_of(found), plan.to_dense()[:, 0].expand(2, -1, -1).long())


windows = st.builds("window({}, {})".format, *[st.none() | st.integers(0, 12)] * 2)
globals_ = st.sampled_from(
    ["first(0)", "first(1)", "first(3)", "first(30)", "marked()", "marked_keys()", "marked_queries()", "last(2)"]
)
leaves = st.one_of(windows, globals_)
patterns = st.recursive(
    leaves, lambda inner: st.builds("({}) {} ({})".format, inner, st.sampled_from("|&"), inner), max_leaves=5
)


@settings(max_examples=150, deadline=None)
@given(text=patterns, case=st.sampled_from(SCENARIOS), length=st.integers(1, 24))
def test_any_pattern_is_split_exactly_or_refused(text, case, length):
    plan, _, _ = plan_of(str(Pattern.parse(text)), length, case)
    found = split(plan, 2)
    if isinstance(found, Split):
        assert torch.equal(pairs_of(found), plan.to_dense()[:, 0].expand(2, -1, -1).long())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("window(3, 3) & stride(2)", r"stride\(2\) is neither a window nor global tokens"),
        ("window(3, 3) | chunk(5)", r"chunk\(5.*\) is neither"),
        ("bigbird(block_size=16)", "is neither a window nor global tokens"),
        ("first(3) & marked()", r"first\(3\) & marked\(\) is neither"),
        ("first(2) & window(4, 0) | marked()", "global tokens have different reaches"),
        ("first(2) & window(9, 9)", r"see window\(9, 9\) only; they must see everything"),
        ("(window(3, 0) | marked()) & window(None, 0)", r"see window\(None, 0\) only"),
        ("window(3, 3) | marked_queries()", r"marked_queries\(\) is neither"),
        ("window(3, 3) | last(2)", r"last\(2.*\) is neither"),
        ("first(0)", "holds no pair"),
        ("per_head(window(1, 1), first(2))", "heads have patterns of their own"),
    ],
)
def test_a_plan_that_is_no_window_with_globals_says_why(pattern, message):
    marks = torch.arange(40)[None] % 7 == 0
    found = split(build_plan(pattern, 40, marks=marks), 1)
    assert isinstance(found, str)
    assert re.search(message, found), found


def test_queries_with_keys_ahead_in_reach_are_refused():
    assert "queries that are not the last" in split(build_plan("window(3, 3)", 10, 40, q_offset=5), 1)
    found = split(build_plan("window(3, 0) | first(2) & window(None, 0)", 10, 40, q_offset=5), 1)
    assert torch.equal(
        pairs_of(found),
        build_plan("window(3, 0) | first(2) & window(None, 0)", 10, 40, q_offset=5).to_dense()[:, 0].long(),
    )


def test_padding_inside_a_sequence_is_refused():
    real = torch.ones(1, 20, dtype=torch.bool)
    real[0, 7] = False
    assert split(build_plan("window(3, 0)", 20, key_padding_mask=real), 1) == "padding inside a sequence"


def test_a_mask_function_is_refused():
    plan = build_plan("window(3, 0)", 20, mask_function=lambda b, h, q, k: k <= q)
    assert "element by element" in split(plan, 1)
