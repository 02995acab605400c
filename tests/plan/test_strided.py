"""Strides put side by side: each pair counts once, and which patterns are worth it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf import Pattern, build_plan
from sparse_hf.pattern.forms import read_stride
from sparse_hf.plan import (
    NOTHING,
    ByHeads,
    PlanKey,
    Regrouped,
    find_strided_plan,
    lookup,
    regrouped,
    strided,
    strided_plan,
)
from tests.table import SCENARIOS, causal_form, scenario

PATTERNS = [
    "stride(7)",
    "stride(300)",
    "window(60, 60) & stride(3)",
    "window(40, 3) & stride(10)",
    "window(16, 0) | stride(16)",
    "window(9, 20) | window(70, 35) & stride(5)",
    "stride(5) | first(3)",
    "stride(4) | window(6, 2) | marked()",
    "stride(4) | first(2) | marked()",
    "stride(6) & window(50, 50) | marked_keys()",
    "stride(8) & window(40, 0) | stride(8) & window(0, 24)",
    "window(5, 5) | (first(20) | stride(6)) & window(30, 30) & stride(6)",
    "longformer(attention_window=64, num_global=2, dilation=4)",
    "sparse_transformer(stride=16, mode='strided')",
    "sparse_transformer_heads(num_heads=4, stride=16)",
    "per_head(stride(3), window(9, 9), stride(5) | first(2), window(9, 9))",
]


@pytest.fixture
def always(monkeypatch):
    """Regroup whatever can be, however little that spares."""
    lookup.forget_plans()
    monkeypatch.setattr(strided, "MIN_GAIN", 0)
    yield
    lookup.forget_plans()


def strided_plan_of(text: str, q_len: int, kv_len: int | None = None):
    """What strides become of a pattern; None: blocks."""
    kv_len = q_len if kv_len is None else kv_len
    key = PlanKey(Pattern.parse(text), q_len, kv_len, kv_len - q_len, torch.device("cpu"))
    return find_strided_plan(key, NOTHING)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_of_these_are_regrouped(pattern, always):
    for text in (pattern, causal_form(pattern)):
        if "first(20)" in text:
            # global tokens that only see every sixth token are none
            assert "is part of a stride" in read_stride(Pattern.parse(text), 500)
            continue
        found = strided_plan_of(text, 500)
        assert isinstance(found, ByHeads if "heads" in text or "per_head" in text else Regrouped), text


def pairs_of(found: Regrouped, batch: int) -> torch.Tensor:
    """How often the two parts hold each pair, `[B, K, K]`, from the tables alone."""
    near = 0 if found.rest is None else found.rest.to_dense()[:, 0].long()
    far = strided_plan(found, batch).to_dense()[:, 0].long()
    step, count = found.step, -(-found.kv_len // found.step)
    far = far.expand(batch * step, -1, -1).view(batch, step, count, count)
    total = torch.zeros(batch, count, step, count, step, dtype=torch.long)
    for residue in range(step):
        total[:, :, residue, :, residue] = far[:, residue]
    return near + total.view(batch, count * step, count * step)[:, : found.kv_len, : found.kv_len]


windows = st.builds("window({}, {})".format, *[st.none() | st.integers(0, 14)] * 2)
strides = st.builds("stride({})".format, st.integers(1, 9))
globals_ = st.sampled_from(
    ["first(0)", "first(1)", "first(5)", "marked()", "marked_keys()", "marked_queries()", "chunk(3)"]
)
leaves = st.one_of(windows, strides, globals_)
anything = st.recursive(
    leaves, lambda inner: st.builds("({}) {} ({})".format, inner, st.sampled_from("|&"), inner), max_leaves=4
)
likely = st.builds("stride({}) & {} | {}".format, st.integers(2, 9), windows, anything)


@settings(max_examples=300, deadline=None)
@given(text=anything | likely, case=st.sampled_from(SCENARIOS), length=st.integers(1, 24))
def test_any_pattern_is_regrouped_exactly_or_not_at_all(text, case, length):
    data = scenario(case, length, 2)
    batch = data["real"], data["documents"], data["marks"]
    pattern = Pattern.parse(text)
    strides = read_stride(pattern, length)
    if isinstance(strides, str):
        return
    names = ("key_padding_mask", "segment_ids", "marks")
    whole = build_plan(pattern, length, **dict(zip(names, batch, strict=True))).to_dense()[:, 0].long()
    real = torch.ones(2, length, dtype=torch.bool) if batch[0] is None else batch[0]
    # what fills up the last step of a causal window is never looked at
    assert torch.equal(
        pairs_of(regrouped(strides, length, batch, "cpu"), 2) * real[:, :, None], whole.expand(2, -1, -1)
    )


def test_what_spares_little_stays_as_blocks():
    assert type(strided_plan_of("stride(128) & window(None, 0)", 12_288)) is Regrouped
    assert strided_plan_of("window(60, 60) & stride(3)", 12_288) is None
    assert strided_plan_of("stride(16)", 100) is None
    # blocks of a long stride are few, and residues that differ cost a block each
    assert (
        type(strided_plan_of("stride(6000)", 12_000)) is Regrouped and strided_plan_of("stride(6000)", 12_001) is None
    )
    assert type(strided_plan_of("stride(64)", 1280)) is Regrouped and strided_plan_of("stride(64)", 1281) is None
    assert strided_plan_of("stride(16)", 10, 1000) is None
