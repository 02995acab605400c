"""Linearity, dropout, lse, purity and errors of `sparse_attention`."""

from __future__ import annotations

import logging
import types

import pytest
import torch

from sparse_hf import BlockPlan, attention, build_plan, sparse_attention
from sparse_hf.attention import merge
from sparse_hf.attention.dropout import kept
from sparse_hf.testing import AllocationInterceptor
from tests import oracle

# 101 blocks of 128: no other dimension here is near the length or its blocks
LONG = 12_928


def random(*sizes, dtype=torch.float32):
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


@pytest.mark.parametrize(
    "pattern", ["window(511, 0)", "window(256, 256) | first(4)", "window(64, 64) | marked()", "bigbird(block_size=64)",
                "per_head(window(100, 0), window(300, 0) & stride(3))"],
)  # fmt: skip
def test_no_tensor_has_two_lengths(pattern):
    q, k, v = random(*[(1, 2, LONG, 16)] * 3)
    marks = torch.arange(LONG)[None] % 5000 == 17
    with AllocationInterceptor(LONG) as seen:
        out, lse = sparse_attention(q, k, v, pattern, marks=marks, backend="blockwise", return_lse=True)
        (out.sum() + lse.sum()).backward()
    assert not seen.quadratic and seen.calls > 1000
    # nor is anything as large as a strip of rows against all keys
    assert seen.largest <= 2 * 128 * LONG


@pytest.mark.parametrize("pattern", ["window(64, 64) | marked()", "(window(64, 0) | marked_keys()) & window(None, 0)"])
def test_marks_all_over_a_text_are_few_tiles(pattern):
    q, k, v = random(*[(1, 2, LONG, 16)] * 3)
    marks = torch.arange(LONG)[None] % 100 == 17
    with AllocationInterceptor(LONG) as seen:
        out, lse = sparse_attention(q, k, v, pattern, marks=marks, backend="blockwise", return_lse=True)
        (out.sum() + lse.sum()).backward()
    # a look at every pair of blocks would be 101 * 101 tiles, each some dozens of allocations
    assert not seen.quadratic and seen.calls < 60_000
    assert seen.largest <= 2 * 128 * LONG


def test_the_interceptor_sees_what_the_reference_makes():
    n = 257
    q, k, v = random(*[(1, 2, n, 16)] * 3)
    with AllocationInterceptor(n) as seen:
        sparse_attention(q, k, v, "window(3, 0)", backend="reference").sum().backward()
    assert any(shape[-2:] == (n, n) for _, shape in seen.quadratic)


@pytest.mark.parametrize("pattern", ["window(40, 7) | first(2)", "window(40, 7) | marked()"])
def test_dropout_is_the_same_mask_on_every_backend_and_exact(pattern):
    q, k, v = random((2, 4, 200, 16), (2, 2, 200, 16), (2, 2, 200, 16), dtype=torch.float64)
    rate = 0.3
    marks = torch.rand(2, 200) < 0.1
    plan = build_plan(pattern, 200, marks=marks)

    def run(backend):
        torch.manual_seed(5)
        out, lse = sparse_attention(q, k, v, plan, dropout=rate, backend=backend, return_lse=True)
        return out, lse, *torch.autograd.grad((out * torch.arange(16)).sum() + lse.sum(), (q, k, v))

    torch.manual_seed(5)
    seed = torch.randint(0, 0xFFFFFFFF, (), dtype=torch.int64)
    factor = kept(seed, 2, 4, 200, 200, rate, "cpu") / (1 - rate)
    mask = oracle.dense_mask(pattern, 200, 200, marks=marks)
    out, lse = oracle.attention(q, k, v, mask, factor)
    exact = out, lse, *torch.autograd.grad((out * torch.arange(16)).sum() + lse.sum(), (q, k, v))
    for backend in ("reference", "blockwise"):
        for got, wanted in zip(run(backend), exact, strict=True):
            torch.testing.assert_close(got, wanted)
    assert not torch.equal(sparse_attention(q, k, v, plan, dropout=rate), sparse_attention(q, k, v, plan, dropout=rate))


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    for rate in (0.1, 0.5):
        flags = kept(torch.tensor(7), 2, 4, 300, 300, rate, "cpu")
        # five standard deviations of a binomial
        assert abs(flags.float().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / flags.numel()) ** 0.5
        for a, b in ((flags[0], flags[1]), (flags[:, 0], flags[:, 1]), (flags[..., 1:], flags[..., :-1])):
            assert abs((a == b).float().mean() - ((1 - rate) ** 2 + rate**2)) < 5e-3
    q, k, v = (t.detach() for t in random(*[(1, 1, 64, 8)] * 3))
    mean = torch.stack([sparse_attention(q, k, v, "window(9, 9)", dropout=0.2) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, sparse_attention(q, k, v, "window(9, 9)"), atol=0.12, rtol=0)


def test_parts_merge_to_the_whole():
    q, k, v = random(*[(1, 2, 100, 16)] * 3, dtype=torch.float64)
    whole = sparse_attention(q, k, v, "window(None, 0)", return_lse=True)
    near = sparse_attention(q, k, v, "window(9, 0)", return_lse=True)
    # keys further back than 9: shift the causal mask by ten keys
    far = sparse_attention(q, k[:, :, :90], v[:, :, :90], build_far_plan(), return_lse=True)
    for got, wanted in zip(merge([near, far]), whole, strict=True):
        torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(o.square().sum() + s.sum(), (q, k, v)) for o, s in (merge([near, far]), whole)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def build_far_plan() -> BlockPlan:
    # the last 90 of 90 keys cannot hold 100 queries: give the pairs as a mask over the 100 keys, cut to 90
    plan = build_plan("window(None, 0)", 100, mask_function=lambda b, h, q, k: k <= q - 10)
    from dataclasses import replace

    return replace(plan, kv_len=90)


def test_batch_data_may_change_in_place():
    # plans are remembered by content: the same tensor with other content is another batch
    q, k, v = (t.detach() for t in random(*[(1, 2, 50, 8)] * 3))
    real = torch.ones(1, 50, dtype=torch.bool)
    real[0, 40:] = False
    first = sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=real)
    real[0, 30:] = False
    second = sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=real)
    assert (second[:, :, 30:] == 0).all() and not (first[:, :, 30:40] == 0).all()


def test_a_mask_that_is_gone_is_not_the_mask_that_is_not_given():
    q, k, v = (t.detach() for t in random(*[(1, 2, 50, 8)] * 3))
    given = (torch.arange(50) < 30)[None]
    sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=given)
    del given
    marks = (torch.arange(50) == 3)[None]
    plain = sparse_attention(q, k, v, "window(5, 5)", marks=marks)
    torch.testing.assert_close(plain, sparse_attention(q, k, v, "window(5, 5)"))


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (128, "attention on cpu in torch.float32 runs on backend 'blockwise'"),
        (
            8,
            "attention of fewer than 128 queries on cpu in torch.float32 runs on PyTorch's scaled_dot_product_attention over the "
            "keys that they see",
        ),
    ],
)
def test_auto_says_what_it_chose_once(queries, said, caplog):
    from sparse_hf.attention.api import _say, _say_torch

    _say.cache_clear()
    _say_torch.cache_clear()
    q, k, v = (t.detach() for t in random(*[(1, 1, queries, 8)] * 3))
    with caplog.at_level(logging.INFO, logger="sparse_hf"):
        for _ in range(3):
            sparse_attention(q, k, v, "window(1, 0)")
    assert [r.message for r in caplog.records] == [said]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"backend": "fast"},
            ValueError,
            "backend is 'fast'; the known ones are 'auto', 'reference', 'blockwise', 'flex', 'fa'",
        ),
        (
            {"backend": "flex"},
            NotImplementedError,
            "backend 'flex' cannot run this call: it needs a GPU and q is on cpu",
        ),
        ({"dropout": 1.0}, ValueError, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"q": torch.zeros(1, 3, 10, 8)}, ValueError, "2 key heads do not divide 3 query heads"),
        ({"q": torch.zeros(4, 10, 8)}, ValueError, "each must be"),
        ({"v": torch.zeros(1, 2, 9, 8)}, ValueError, "must agree"),
        ({"q": torch.zeros(1, 4, 10, 8, dtype=torch.float64)}, ValueError, "must agree"),
        ({"key_padding_mask": torch.ones(1, 9)}, ValueError, r"must be \[batch, 10\]"),
        ({"key_padding_mask": torch.eye(3, 10)}, ValueError, "the batch data has 3 rows; q has 1"),
        ({"pattern": "per_head(first(1), first(2))"}, ValueError, "per_head names 2 patterns; q has 4 heads"),
        ({"pattern": build_plan("first(1)", 9)}, ValueError, "the plan is for 9 queries and 9 keys; q has 10 and k 10"),
        ({"pattern": build_plan("first(1)", 10), "marks": torch.ones(1, 10)}, ValueError, "belong to build_plan"),
        ({"q_offset": 3}, ValueError, "10 queries from key index 3 do not lie within 10 keys"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    given = {
        "q": torch.zeros(1, 4, 10, 8),
        "k": torch.zeros(1, 2, 10, 8),
        "v": torch.zeros(1, 2, 10, 8),
        "pattern": "first(1)",
    }
    given = {**given, **change}
    tensors = [given.pop(name) for name in ("q", "k", "v", "pattern")]
    with pytest.raises(error, match=message):
        sparse_attention(*tensors, **given)


def test_operator_agrees_with_torchs_own_checks():
    q, k, v = random((1, 4, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8))
    real = torch.ones(1, 40, dtype=torch.bool)
    arguments = (q, k, v, real, None, None, None, None, "window(5, 0)", 0, 0.5, None, 0.0, "auto")
    torch.library.opcheck(torch.ops.sparse_hf.attention.default, arguments)
    torch.library.opcheck(torch.ops.sparse_hf.attention_of_lengths.default, (*arguments[:3], None, *arguments[4:]))


def test_a_mask_that_was_written_to_is_read_again():
    q, k, v = random((1, 4, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8))
    real = torch.ones(1, 40, dtype=torch.bool)
    real[:, 30:] = False
    before = sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real)
    assert torch.equal(sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real), before)
    real[:, 20:] = False
    after = sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real)
    torch.testing.assert_close(after[:, :, :20], before[:, :, :20])
    assert (after[:, :, 20:] == 0).all()
    # another tensor in its place
    real = torch.ones(1, 40, dtype=torch.bool)
    assert (sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real)[:, :, 20:] != 0).any()


def test_compiled_gradients_of_a_backend_that_leans_on_autograd(monkeypatch):
    """As FlexAttention, which pads, gathers and merges around its own kernel."""

    def attend(q, k, v, plan, scoring, dropout, seed):
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, 3)) for t in (q, k, v))
        scores = q @ k.repeat_interleave(2, 1).mT * scoring.scale
        mask = torch.nn.functional.pad(plan.to_dense()[:, 0], (0, 3, 0, 3))
        mask[:, -3:] = True
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        lse = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1)
        return (weights @ v.repeat_interleave(2, 1))[:, :, :-3], lse[..., :-3]

    leaning = types.SimpleNamespace(refuses=lambda *_: None, attend=attend)
    monkeypatch.setitem(attention.BACKENDS, "flex", leaning)
    tensors = random((1, 4, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8))

    def gradients(backend, compiled):
        def loss(q, k, v):
            out, lse = sparse_attention(q, k, v, "window(5, 0)", backend=backend, return_lse=True)
            return out.square().sum() + lse.sum()

        loss = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        return torch.autograd.grad(loss(*tensors), tensors)

    for one, other in zip(gradients("flex", True), gradients("blockwise", False), strict=True):
        torch.testing.assert_close(one, other)
