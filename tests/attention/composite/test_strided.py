"""StrideForm by regrouping: which patterns are, that each pair counts once, and the exactness of what comes out."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf import Pattern, build_plan, sparse_attention
from sparse_hf.attention.backends import reference
from sparse_hf.attention.composite.strided import Composition
from sparse_hf.attention.scoring import Scoring
from sparse_hf.pattern.forms import StrideForm, read_stride
from sparse_hf.plan import BlockPlan, ByHeads, Regrouped, cached_plan, lookup, regrouped, strided_plan
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.test_exactness import compare, tensors
from tests.table import SCENARIOS, SHAPES, causal_form, scenario

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
CASES = list(itertools.product(PATTERNS, ("causal", "bidirectional"), SCENARIOS))
LENGTHS = [1, 63, 96, 257, 500]


def forget():
    lookup._plan_without_batch.cache_clear()
    lookup._RECENT.clear()
    lookup._STAMPED.clear()


@pytest.fixture
def always(monkeypatch):
    """Regroup whatever can be, however little that spares."""
    forget()
    monkeypatch.setattr("sparse_hf.plan.strided.GAIN", 0)
    yield
    forget()


def cases(step: int = 1, shift: int = 0):
    return [
        pytest.param(causal_form(pattern) if causal == "causal" else pattern, LENGTHS[(i // len(SCENARIOS) + i) % 5], name,
                     SHAPES[i % len(SHAPES)], id=f"{i}-{pattern[:20]}-{causal}-{name}")
        for i, (pattern, causal, name) in enumerate(CASES) if i % step == shift
    ]  # fmt: skip


@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases())
def test_regrouped_is_exact(pattern, length, case, shape, always):
    if pattern.startswith("stride(300)"):
        pytest.skip("rows of one key: what the gradients are is rounding; see below in float64")
    compare("blockwise", pattern, length, case, shape, torch.float32)


@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(5))
def test_regrouped_is_exact_in_bfloat16(pattern, length, case, shape, always):
    compare("auto", pattern, length, case, shape, torch.bfloat16)


@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(3))
def test_regrouped_is_exact_in_float64(pattern, length, case, shape, always):
    batch = scenario(case, length, 2)
    q_len = batch.pop("q_len")
    given = {"key_padding_mask": batch["real"], "segment_ids": batch["documents"], "marks": batch["marks"]}
    mask = oracle.dense_mask(pattern, q_len, length, **batch)
    drawn = tensors(shape, q_len, length, torch.float64)
    exact = oracle.gradients(lambda *t: oracle.attention(*t, mask), *drawn)
    ours = oracle.gradients(lambda *t: sparse_attention(*t, pattern, **given, return_lse=True), *drawn)
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(11))
def test_regrouped_is_exact_on_a_gpu(pattern, length, case, shape, backend, always):
    compare(backend, pattern, length, case, shape, torch.bfloat16, "cuda")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_of_these_are_regrouped(pattern, always):
    for text in (pattern, causal_form(pattern)):
        if "first(20)" in text:
            # global tokens that only see every sixth token are none
            assert "is part of a stride" in read_stride(Pattern.parse(text), 500)
            continue
        found = cached_plan(text, 500, 500, 0, (None, None, None), "cpu", may_regroup=True)
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


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("window(3, 3)", "no stride"),
        ("stride(1)", "no stride"),
        ("stride(3) | stride(5)", "or several"),
        ("stride(3) & marked_queries()", r"marked_queries\(\) is part of a stride"),
        ("stride(3) | chunk(9)", r"beside the stride: chunk\(9, 0, 0\) is neither"),
        ("stride(3) | first(2) & window(9, 0)", r"reaches further than the global tokens, window\(9, 0\)"),
        ("stride(3) & window(9, 0) | window(9, 0)", r"window\(9, 0\) holds all strided pairs"),
    ],
)
def test_what_is_not_regrouped_says_why(pattern, message):
    found = read_stride(Pattern.parse(pattern), 100)
    assert isinstance(found, str)
    assert message.replace("\\", "") in found, found


def test_dilation_becomes_a_window():
    found = read_stride(Pattern.parse("window(60, 30) & stride(7) | window(20, 6)"), 100)
    assert isinstance(found, StrideForm)
    assert str(found.side_by_side) == "window(8, 4) & outside(window(2, 0))"


def test_what_spares_little_stays_as_blocks():
    def kind(text: str, length: int, **options):
        return type(cached_plan(text, length, length, 0, (None, None, None), "cpu", **{"may_regroup": True, **options}))

    assert kind("stride(128) & window(None, 0)", 12_288) is Regrouped
    assert kind("window(60, 60) & stride(3)", 12_288) is BlockPlan
    assert kind("stride(16)", 100) is BlockPlan
    # blocks of a long stride are few, and residues that differ cost a block each
    assert kind("stride(6000)", 12_000) is Regrouped and kind("stride(6000)", 12_001) is BlockPlan
    assert kind("stride(64)", 1280) is Regrouped and kind("stride(64)", 1281) is BlockPlan
    assert kind("stride(128)", 12_288, may_regroup=False) is BlockPlan
    assert type(cached_plan("stride(16)", 10, 1000, 990, (None, None, None), "cpu", may_regroup=True)) is BlockPlan


def test_dropout_and_bias_stay_as_blocks(monkeypatch):
    # dropout is a hash of places, which must be those of the text
    q, k, v = tensors((4, 2, 32), 608, 608, torch.float32)
    monkeypatch.setattr("sparse_hf.attention.composite.strided.Composition", None)
    sparse_attention(q, k, v, "stride(16)", dropout=0.5)
    sparse_attention(q, k, v, "stride(16)", relative_bias=torch.zeros(4, 1215))
    sparse_attention(q, k, v, build_plan("stride(16)", 608))
    with pytest.raises(TypeError):
        sparse_attention(q, k, v, "stride(16)")


def test_a_soft_cap_is_kept(always):
    q, k, v = tensors((4, 2, 32), 257, 257, torch.float64)
    ours, exact = (
        sparse_attention(q, k, v, "stride(16) | window(9, 0)", softcap=2.0, backend=name)
        for name in ("auto", "reference")
    )
    torch.testing.assert_close(ours, exact)


def test_backends_that_lean_on_autograd_run_again(always):
    # `flex` is one; here the reference stands for it
    stand_in = SimpleNamespace(attend=reference.attend)
    composed = Composition(lambda q, v, plan: stand_in)
    for text in ("stride(7) & window(None, 0) | window(20, 0)", PATTERNS[-1], "stride(9) | first(2)"):
        found = cached_plan(text, 100, 100, 0, (None, None, None), "cpu", may_regroup=True)
        drawn = tensors((4, 2, 32), 100, 100, torch.float64)
        mask = oracle.dense_mask(text, 100, 100)
        exact = oracle.gradients(lambda *t, m=mask: oracle.attention(*t, m), *drawn)
        ours = oracle.gradients(lambda *t, p=found: composed.attend(*t, p, Scoring(32**-0.5), 0.0, None), *drawn)
        for got, wanted in zip(ours, exact, strict=True):
            torch.testing.assert_close(got, wanted)


def test_auto_says_so(caplog):
    from sparse_hf.attention.api import _say

    _say.cache_clear()
    q, k, v = tensors((4, 2, 32), 1000, 1000, torch.float32)
    with caplog.at_level(logging.INFO, logger="sparse_hf"):
        sparse_attention(q, k, v, "stride(16)")
    wanted = "attention on cpu in torch.float32, tokens of a stride side by side, runs on backend 'blockwise'"
    assert [record.message for record in caplog.records] == [wanted]


@pytest.mark.parametrize(
    "pattern", ["sparse_transformer(stride=16)", "sparse_transformer_heads(num_heads=4, stride=16)"]
)
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_equals_eager(pattern, padded, always):
    drawn = tensors((4, 2, 32), 600, 600, torch.float64)
    real = torch.ones(2, 600, dtype=torch.bool)
    real[0, :77] = False

    def attend(q, k, v):
        return sparse_attention(q, k, v, pattern, key_padding_mask=real if padded else None, return_lse=True)

    eager = oracle.gradients(attend, *drawn)
    compiled = oracle.gradients(torch.compile(attend, fullgraph=True, backend="aot_eager"), *drawn)
    for got, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("pattern", ["sparse_transformer()", "window(4000, 4000) & stride(50) | first(2)"])
def test_nothing_has_two_lengths(pattern):
    length = 16_390
    q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    with AllocationInterceptor(length) as seen:
        out, lse = sparse_attention(q, k, v, pattern, return_lse=True)
        (out.sum() + lse.sum()).backward()
    assert not seen.quadratic
    # scores of one call of the backend at most, and q itself
    assert seen.largest <= 4 * q.numel()
