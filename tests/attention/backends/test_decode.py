"""A few queries, which "auto" gives to PyTorch's own attention over the keys that they see, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention.backends.sdpa import decode as few
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.test_exactness import BATCH, tensors
from tests.table import PATTERNS, SCENARIOS, SHAPES, causal_form, scenario


def answers_of(module, monkeypatch) -> list:
    """What a module's `attend` answers from now on: None where it leaves a call to others."""
    found = []

    def watched(*given):
        found.append(attend(*given))
        return found[-1]

    attend = module.attend
    monkeypatch.setattr(module, "attend", watched)
    return found


@pytest.fixture
def answers(monkeypatch):
    """Everywhere."""
    monkeypatch.setattr(few, "WALKERS", set())
    return answers_of(few, monkeypatch)


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact(pattern, case, answers):
    number = PATTERNS.index(pattern) + SCENARIOS.index(case)
    text = causal_form(pattern) if number % 2 else pattern
    length, shape = (100, 127)[number % 2], SHAPES[number % len(SHAPES)]
    compare(text, length, case, shape)
    assert answers[-1] is not None


@pytest.mark.parametrize("queries", [1, 2, 17])
@pytest.mark.parametrize("pattern", ["window(40, 0)", "streaming(window=64, sinks=4)", "fixed(16, 3)", "last(3)"])
def test_exact_behind_a_long_text(pattern, queries, answers):
    shape = (4, 2, 32)
    mask = oracle.dense_mask(causal_form(pattern), queries, 1000)
    q, k, v = tensors(shape, queries, 1000, torch.float64)
    got = sparse_attention(q, k, v, causal_form(pattern))
    assert answers[-1] is not None
    torch.testing.assert_close(got, oracle.attention(q, k, v, mask)[0], atol=1e-12, rtol=1e-12)


def without_lse(function):
    """As `oracle.gradients` wants it."""
    return lambda q, k, v: (function(q, k, v), q.new_zeros(1))


def compare(pattern: str, length: int, case: str, shape):
    batch = scenario(case, length, BATCH)
    q_len = batch.pop("q_len")
    mask = oracle.dense_mask(pattern, q_len, length, **batch)
    given = {"key_padding_mask": batch["real"], "segment_ids": batch["documents"], "marks": batch["marks"]}
    qkv = tensors(shape, q_len, length, torch.float64)
    got = oracle.gradients(without_lse(lambda q, k, v: sparse_attention(q, k, v, pattern, **given)), *qkv)
    right = oracle.gradients(without_lse(lambda q, k, v: oracle.attention(q, k, v, mask)[0]), *qkv)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_where_nobody_sees_anything_others_give_gradients_of_zero(answers):
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 32), 5, 5, torch.float64))
    out = sparse_attention(q, k, v, "window(2, 2)", key_padding_mask=torch.zeros(BATCH, 5, dtype=torch.bool))
    assert answers == [None] and not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_window_reads_what_it_holds():
    plan = build_plan("streaming(window=64, sinks=4)", 1, 100_000)
    seen = few.look(plan, 1)
    assert seen.keys == ((0, 4), (100_000 - 64, 100_000)) and seen.mask is None and seen.blind is None


ONE = [
    "streaming(window=6, sinks=3)", "window(5, 3)", "window(5, 3) | first(2)", "first(4)", "first(3) & window(9, 0) | window(2, 0)",
    "window(3, 0) | first(3) & window(None, 0) | marked_keys() & window(None, 0)",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ONE)
def test_ranges_of_a_single_query_are_its_row_of_the_mask(pattern):
    told = 0
    for kv_len in (1, 7, 40):
        mask = oracle.dense_mask(pattern, kv_len, kv_len).view(-1, kv_len, kv_len)[0]
        for x in range(kv_len):
            ranges = few._ranges_of_one(build_plan(pattern, 1, kv_len, q_offset=x))
            # a global query is left to the tables
            if ranges is not None:
                seen = [k for begin, end in ranges for k in range(begin, end)]
                assert seen == mask[x].nonzero().flatten().tolist()
                told += 1
    assert told > 20


def test_global_queries_of_a_long_text_are_left_to_others(answers):
    q, k, v = tensors((4, 2, 32), 100, 60_000, torch.float32)
    with AllocationInterceptor(60_000) as found:
        out = sparse_attention(q, k, v, "window(None, None)")
    assert answers == [None] and not found.quadratic
    torch.testing.assert_close(out, sparse_attention(q, k, v, "window(None, None)", backend="blockwise"))


@pytest.mark.parametrize("more", [{"return_lse": True}, {"softcap": 5.0}, {"dropout": 0.1}, {"backend": "blockwise"}])
def test_what_is_asked_besides_is_left_to_others(more, answers):
    q, k, v = tensors((4, 2, 32), 5, 100, torch.float32)
    sparse_attention(q, k, v, "window(20, 0)", **more)
    assert not answers
