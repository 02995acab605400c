"""A few queries, which "auto" gives to PyTorch's own attention over the keys that they see, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import Pattern, build_plan, sparse_attention
from sparse_hf.attention import attend
from sparse_hf.attention.backends.sdpa import decode
from sparse_hf.attention.dispatch import DECODE
from tests import oracle
from tests.attention.exactness import batch_of, call_of, tensors, without_lse
from tests.table import PATTERNS, SCENARIOS, SHAPES, causal_form


def decoded(q, k, v, pattern: str, **given) -> torch.Tensor:
    """By this backend, also where another is faster."""
    call = call_of(q, k, v, pattern, **given, wants_lse=False)
    assert DECODE.why_not(call) is None
    return attend(call, DECODE)[0]


@pytest.mark.cross
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact(pattern, case):
    number = PATTERNS.index(pattern) + SCENARIOS.index(case)
    text = causal_form(pattern) if number % 2 else pattern
    length, shape = (100, 127)[number % 2], SHAPES[number % len(SHAPES)]
    compare(text, length, case, shape)


def compare(pattern: str, length: int, case: str, shape):
    q_len, given, data = batch_of(case, length)
    mask = oracle.dense_mask(pattern, q_len, length, **data)
    qkv = tensors(shape, q_len, length, torch.float64)
    got = oracle.gradients(without_lse(lambda q, k, v: decoded(q, k, v, pattern, **given)), *qkv)
    right = oracle.gradients(without_lse(lambda q, k, v: oracle.attention(q, k, v, mask)[0]), *qkv)
    front = oracle.gradients(without_lse(lambda q, k, v: sparse_attention(q, k, v, pattern, **given)), *qkv)
    for one, through_the_front_door, other in zip(got, front, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(through_the_front_door, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("queries", [1, 2, 17])
@pytest.mark.parametrize("pattern", ["window(40, 0)", "streaming(window=64, sinks=4)", "fixed(16, 3)", "last(3)"])
def test_exact_behind_a_long_text(pattern, queries):
    shape = (4, 2, 32)
    mask = oracle.dense_mask(causal_form(pattern), queries, 1000)
    q, k, v = tensors(shape, queries, 1000, torch.float64)
    right = oracle.attention(q, k, v, mask)[0]
    torch.testing.assert_close(decoded(q, k, v, causal_form(pattern)), right, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sparse_attention(q, k, v, causal_form(pattern)), right, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ranges_that_are_merged_where_they_stand_are_exact(dtype):
    q, k, v = tensors((4, 2, 32), 1, 1000, dtype)
    call = call_of(q, k, v, "streaming(window=64, sinks=4)", wants_lse=False)
    assert decode._merges_ranges(call, decode._seen(call))
    mask = oracle.dense_mask("streaming(window=64, sinks=4)", 1, 1000)
    right = oracle.attention(*(t.double() for t in (q, k, v)), mask)[0]
    near = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(attend(call, DECODE)[0].double(), right, atol=near, rtol=near)


def test_a_window_reads_what_it_holds():
    plan = build_plan("streaming(window=64, sinks=4)", 1, 100_000)
    seen = decode.look_up(plan, 1)
    assert seen.keys == ((0, 4), (100_000 - 64, 100_000)) and seen.mask is None and seen.blind is None


ONE = [
    "streaming(window=6, sinks=3)", "window(5, 3)", "window(5, 3) | first(2)", "first(4)", "first(3) & window(9, 0) | window(2, 0)",
    "window(3, 0) | first(3) & window(None, 0) | marked_keys() & window(None, 0)",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ONE)
def test_ranges_of_a_single_query_are_its_row_of_the_mask(pattern):
    found = 0
    for kv_len in (1, 7, 40):
        mask = oracle.dense_mask(pattern, kv_len, kv_len).view(-1, kv_len, kv_len)[0]
        for x in range(kv_len):
            ranges = decode.ranges_of_one(Pattern.parse(pattern), kv_len, x)
            # a global query is left to the tables
            if ranges is not None:
                seen = [k for begin, end in ranges for k in range(begin, end)]
                assert seen == mask[x].nonzero().flatten().tolist()
                found += 1
    assert found > 20
