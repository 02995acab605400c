"""Batch data that changes between calls, comes from another mode, or is used by several threads at once."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch

from sparse_hf import Pattern, sparse_attention
from sparse_hf.plan import lookup
from tests import oracle
from tests.attention import hashes
from tests.attention.exactness import BATCH, batch_of, leaves, tensors
from tests.table import PATTERNS, causal_form
from tests.threads import THREADS, at_once


def test_batch_data_may_change_in_place():
    # plans are remembered by content: the same tensor with other content is another batch
    q, k, v = (t.detach() for t in leaves(*[(1, 2, 50, 8)] * 3))
    real = torch.ones(1, 50, dtype=torch.bool)
    real[0, 40:] = False
    first = sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=real)
    real[0, 30:] = False
    second = sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=real)
    assert (second[:, :, 30:] == 0).all() and not (first[:, :, 30:40] == 0).all()


def test_a_mask_that_is_gone_is_not_the_mask_that_is_not_given():
    q, k, v = (t.detach() for t in leaves(*[(1, 2, 50, 8)] * 3))
    given = (torch.arange(50) < 30)[None]
    sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=given)
    del given
    marks = (torch.arange(50) == 3)[None]
    plain = sparse_attention(q, k, v, "window(5, 5)", marks=marks)
    torch.testing.assert_close(plain, sparse_attention(q, k, v, "window(5, 5)"))


def test_a_mask_that_was_written_to_is_read_again():
    q, k, v = leaves((1, 4, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8))
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


def by_numpy(t: torch.Tensor, new: torch.Tensor) -> None:
    t.numpy()[...] = new.numpy()


def by_dlpack(t: torch.Tensor, new: torch.Tensor) -> None:
    torch.from_dlpack(t.view(torch.uint8) if t.dtype == torch.bool else t).copy_(new)


def by_data(t: torch.Tensor, new: torch.Tensor) -> None:
    t.data.copy_(new)


def by_set(t: torch.Tensor, new: torch.Tensor) -> None:
    t.data = new.clone()


# what is written first and then: of each, other numbers of tokens are real, marked, or of a document
WRITTEN = {
    "key_padding_mask": (torch.arange(200).expand(2, -1) < 150, torch.arange(200).expand(2, -1) >= 60),
    "segment_ids": (torch.arange(200).expand(2, -1) // 100, torch.arange(200).expand(2, -1) // 30),
    "marks": (torch.arange(200).expand(2, -1) % 50 == 3, torch.arange(200).expand(2, -1) % 70 == 9),
}


@pytest.mark.cross(("write", "name"), "pattern", "queries")
@pytest.mark.parametrize("write", [by_numpy, by_dlpack, by_data, by_set])
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(
    "pattern",
    [
        "window(9, 9) | marked()",
        "stride(5) | window(20, 0) | marked()",
        "window(5, 0) | lsh(4, 2, 8) | marked()",
        "topk(6) | marked()",
    ],
)
@pytest.mark.parametrize("queries", [200, 20])
def test_what_torch_does_not_notice_is_read_again(pattern, name, write, queries):
    q, k, v = tensors((4, 2, 16), queries, 200, torch.float64)
    old, new = WRITTEN[name]
    given = old.clone()
    before = sparse_attention(q, k, v, pattern, **{name: given})
    write(given, new)
    after = sparse_attention(q, k, v, pattern, **{name: given})
    right = sparse_attention(q, k, v, pattern, **{name: new}, backend="reference")
    torch.testing.assert_close(after, right)
    assert not torch.allclose(before, after)
    # and back
    write(given, old)
    torch.testing.assert_close(sparse_attention(q, k, v, pattern, **{name: given}), before)


@pytest.fixture
def _doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# texts below and above those that decoding takes
@pytest.mark.cross
@pytest.mark.parametrize("length", [60, 200])
@pytest.mark.parametrize("pattern", [*PATTERNS, *hashes.PATTERNS])
def test_a_batch_that_was_seen_in_inference_mode_trains(pattern, length):
    _, given, _ = batch_of("left_padding", length)
    given = {name: t for name, t in given.items() if t is not None}
    with torch.inference_mode():
        q, k, v = tensors((4, 2, 16), length, length, torch.float32)
        # as a server makes them
        inferred = {name: t.clone() for name, t in given.items()}
        before = sparse_attention(q, k, v, pattern, **inferred)
        sparse_attention(q, k, v, pattern, **given)
        plain = sparse_attention(q, k, v, pattern)
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 16), length, length, torch.float32))
    for batch, first in ((given, before), ({}, plain)):
        out = sparse_attention(q, k, v, pattern, **batch)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        right = sparse_attention(q, k, v, pattern, **batch, backend="reference")
        wanted = torch.autograd.grad(right.square().sum(), (q, k, v))
        torch.testing.assert_close(out, first.clone(), atol=1e-5, rtol=1e-5)
        for one, other in zip((out, *grads), (right, *wanted), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.cross
@pytest.mark.usefixtures("_doubles")
@pytest.mark.parametrize("length", [60, 200])
@pytest.mark.parametrize("pattern", [*PATTERNS, *hashes.PATTERNS])
def test_the_default_dtype_changes_nothing(pattern, length):
    _, given, data = batch_of("packed_and_padded", length)
    drawn = tensors((4, 2, 16), length, length, torch.float32)
    found = oracle.gradients(lambda *t: sparse_attention(*t, pattern, **given, return_lse=True), *drawn)
    if "lsh" in pattern:
        torch.set_default_dtype(torch.float32)
        wanted = oracle.gradients(lambda *t: sparse_attention(*t, pattern, **given, return_lse=True), *drawn)
        assert all(map(torch.equal, found, wanted))
        return
    mask = oracle.dense_mask(pattern, length, length, **data)
    wanted = oracle.gradients(lambda *t: oracle.attention(*t, mask), *(t.double() for t in drawn))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)


# calls of all threads together
CALLS = 1000


def test_threads_that_share_plans_are_right():
    """Padding, packing and none, several patterns, lengths that are equal: what plans are remembered by."""
    patterns = [
        "window(20, 20) | first(2)",
        causal_form("window(16, 16) | first(2)"),
        "bigbird(block_size=16)",
        "stride(7) | window(5, 0)",
        "window(9, 9) | marked()",
        "per_head(window(9, 9), chunk(24), window(9, 9), first(4) | window(3, 3))",
        "window(5, 0) | lsh(4, 2, 8)",
        "window(5, 0) | topk_blocks(3, 8)",
        "window(None, None)",
    ]
    cases = []
    for pattern in patterns:
        for case in ("plain", "left_padding", "right_padding", "packed", "packed_and_padded", "last_queries"):
            for length in (96, 150):
                q_len, given, _ = batch_of(case, length)
                drawn = tensors((4, 2, 16), q_len, length, torch.float32)
                right = sparse_attention(*drawn, pattern, **given, backend="reference", return_lse=True)
                cases.append((pattern, given, drawn, right))

    def work(number: int) -> None:
        own = random.Random(number)
        for step in range(CALLS // THREADS):
            pattern, given, drawn, (right, right_lse) = own.choice(cases)
            # half of them with tensors of their own, so that contents are equal and identities are not
            batch = {n: t if t is None or step % 2 else t.clone() for n, t in given.items()}
            # decoding and dense attention give no lse
            if step % 3:
                found = sparse_attention(*drawn, pattern, **batch, return_lse=True)
            else:
                found = sparse_attention(*drawn, pattern, **batch), right_lse
            for one, other in zip(found, (right, right_lse), strict=True):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)

    at_once(work)


def test_plans_of_many_lengths_are_let_go(monkeypatch):
    alive = weakref.WeakSet()
    original = lookup.build_plan

    def build_plan(*given, **named):
        plan = original(*given, **named)
        alive.add(plan)
        return plan

    monkeypatch.setattr(lookup, "build_plan", build_plan)
    for length in range(130, 130 + 3 * lookup.LENGTHS_KEPT):
        q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
        sparse_attention(q, k, v, "chunk(16)")
    gc.collect()
    assert len(alive) <= lookup.LENGTHS_KEPT


def test_a_pattern_as_text_and_as_an_object_are_one():
    q, k, v = tensors((4, 2, 16), 60, 60, torch.float32)
    assert torch.equal(
        sparse_attention(q, k, v, "window(5, 3) | first(2)"),
        sparse_attention(q, k, v, Pattern.parse("window(5, 3) | first(2)")),
    )
    assert q.shape[0] == BATCH
