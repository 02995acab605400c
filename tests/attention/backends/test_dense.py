"""Texts that a pattern leaves whole, which "auto" gives to PyTorch's own dense attention, against attention in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention.backends.sdpa import dense
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.test_exactness import tensors
from tests.attention.test_few import answers_of, without_lse

LENGTH = 200


@pytest.fixture
def answers(monkeypatch):
    return answers_of(dense, monkeypatch)


@pytest.mark.parametrize("shape", [(4, 4, 32), (4, 2, 64), (4, 1, 80)])
@pytest.mark.parametrize("pattern", ["window(None, 0)", "window(199, 0)", "window(None, None)", "sliding_window(4096)"])
def test_exact(pattern, shape, answers):
    mask = oracle.dense_mask(pattern, LENGTH, LENGTH)
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        qkv = tensors(shape, LENGTH, LENGTH, dtype)
        got = oracle.gradients(without_lse(lambda q, k, v: sparse_attention(q, k, v, pattern)), *qkv)
        assert answers[-1] is not None
        exact = oracle.gradients(
            without_lse(lambda q, k, v: oracle.attention(q, k, v, mask)[0]), *(t.double() for t in qkv)
        )
        for one, other in zip(got, exact, strict=True):
            torch.testing.assert_close(one.double(), other, atol=near, rtol=near)


def test_a_plan_and_a_mask_of_ones_are_taken_too(answers):
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.float32)
    right = sparse_attention(q, k, v, "window(None, 0)", backend="blockwise")
    ones = torch.ones(2, LENGTH, dtype=torch.bool)
    for pattern, given in ((build_plan("window(None, 0)", LENGTH), {}), ("causal()", {"key_padding_mask": ones})):
        torch.testing.assert_close(sparse_attention(q, k, v, pattern, **given), right, atol=1e-5, rtol=1e-5)
        assert answers[-1] is not None


@pytest.mark.parametrize(
    ("pattern", "given"),
    [
        ("window(198, 0)", {}),
        ("window(None, 0) | first(1)", {}),
        ("per_head(window(None, 0), full(), full(), full())", {}),
        ("full()", {"key_padding_mask": torch.arange(LENGTH).expand(2, -1) < 150}),
        ("full()", {"segment_ids": torch.arange(LENGTH).expand(2, -1) // 100}),
    ],
)
def test_what_is_left_out_stays_out(pattern, given, answers):
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.float32)
    got = sparse_attention(q, k, v, pattern, **given)
    assert answers == [None]
    torch.testing.assert_close(got, sparse_attention(q, k, v, pattern, **given, backend="blockwise"))


def test_the_last_queries_of_a_text_see_their_own_past(answers):
    q, k, v = tensors((4, 2, 32), 150, LENGTH, torch.float64)
    got = sparse_attention(q, k, v, "window(None, 0)")
    right, _ = oracle.attention(q, k, v, oracle.dense_mask("window(None, 0)", 150, LENGTH))
    torch.testing.assert_close(got, right, atol=1e-12, rtol=1e-12)
    assert answers == [None]


@pytest.mark.parametrize(
    "how",
    [{"backend": "blockwise"}, {"return_lse": True}, {"dropout": 0.5}, {"softcap": 2.0}],
    ids=lambda how: next(iter(how)),
)
def test_what_is_asked_besides_is_left_to_others(how, answers):
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.float32)
    sparse_attention(q, k, v, "full()", **how)
    assert not answers


def test_training_in_16_bits_is_left_to_blockwise(answers):
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.bfloat16)
    sparse_attention(q, k, v, "full()")
    assert answers.pop() is not None
    sparse_attention(q.requires_grad_(), k, v, "full()")
    assert not answers


@pytest.mark.parametrize("pattern", ["window(None, 0)", "full()"])
def test_no_tensor_has_two_lengths(pattern, answers):
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 16), 1999, 1999, torch.float32))
    with AllocationInterceptor(1999) as seen:
        sparse_attention(q, k, v, pattern).sum().backward()
    assert answers[-1] is not None and not seen.quadratic
