"""Strides put side by side: the exactness of what comes out."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention import BACKENDS, attend, dispatch, route
from sparse_hf.attention.composite.strided import Strided
from sparse_hf.plan import find_strided_plan, strided
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.exactness import batch_of, call_of, compare, tensors
from tests.plan.test_strided import PATTERNS
from tests.table import SCENARIOS, SHAPES, causal_form

CASES = list(itertools.product(PATTERNS, ("causal", "bidirectional"), SCENARIOS))
LENGTHS = [1, 63, 96, 257, 500]


@pytest.fixture
def always(monkeypatch):
    """Regroup whatever can be, however little that spares."""
    monkeypatch.setattr(strided, "MIN_GAIN", 0)


def cases(step: int = 1, shift: int = 0):
    return [
        pytest.param(causal_form(pattern) if causal == "causal" else pattern, LENGTHS[(i // len(SCENARIOS) + i) % 5], name,
                     SHAPES[i % len(SHAPES)], id=f"{i}-{pattern[:20]}-{causal}-{name}")
        for i, (pattern, causal, name) in enumerate(CASES) if i % step == shift
    ]  # fmt: skip


@pytest.mark.cross
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases())
def test_regrouped_is_exact(pattern, length, case, shape, always):
    # queries that are not all the tokens stay as blocks, and so do global tokens that see a part of the stride
    if case != "last_queries" and "first(20)" not in pattern and length > 1:
        q_len, given, _ = batch_of(case, length)
        call = call_of(*tensors(shape, q_len, length, torch.float32), pattern, **given)
        assert isinstance(route(call, "blockwise"), Strided)
    if pattern.startswith("stride(300)"):
        pytest.skip("rows of one key: what the gradients are is rounding; see below in float64")
    compare("blockwise", pattern, length, case, shape, torch.float32)


@pytest.mark.cross("length", "case", "shape")
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(5))
def test_regrouped_is_exact_in_bfloat16(pattern, length, case, shape, always):
    compare("auto", pattern, length, case, shape, torch.bfloat16)


@pytest.mark.cross("length", "case", "shape")
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(3))
def test_regrouped_is_exact_in_float64(pattern, length, case, shape, always):
    q_len, given, data = batch_of(case, length)
    mask = oracle.dense_mask(pattern, q_len, length, **data)
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


def test_dropout_and_bias_stay_as_blocks(monkeypatch):
    # dropout is a hash of places, which must be those of the text
    q, k, v = tensors((4, 2, 32), 608, 608, torch.float32)

    def forward(self, call):
        raise TypeError("strides")

    monkeypatch.setattr(Strided, "forward", forward)
    sparse_attention(q, k, v, "stride(16)", dropout=0.5)
    sparse_attention(q, k, v, "stride(16)", relative_bias=torch.zeros(4, 1215))
    sparse_attention(q, k, v, build_plan("stride(16)", 608))
    with pytest.raises(TypeError, match="strides"):
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
    composed = Strided(lambda call: BACKENDS["reference"])
    for text in ("stride(7) & window(None, 0) | window(20, 0)", PATTERNS[-1], "stride(9) | first(2)"):
        drawn = tensors((4, 2, 32), 100, 100, torch.float64)
        call = call_of(*drawn, text)
        found = find_strided_plan(call.plan_key, call.batch)
        mask = oracle.dense_mask(text, 100, 100)
        exact = oracle.gradients(lambda *t, m=mask: oracle.attention(*t, m), *drawn)
        ours = oracle.gradients(lambda *t, p=found: attend(call_of(*t, text, chosen_plan=p), composed), *drawn)  # noqa: B023
        for got, wanted in zip(ours, exact, strict=True):
            torch.testing.assert_close(got, wanted)


def test_auto_says_so(caplog):
    dispatch._say.cache_clear()
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
