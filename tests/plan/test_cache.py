"""What is computed once: by whom, and that it serves later calls, whatever mode those run in."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import is_dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sparse_hf import Pattern, build_plan, sparse_attention
from sparse_hf.pattern import blocks
from sparse_hf.pattern.forms import StrideForm, read_stride
from sparse_hf.plan import joined_rows, kept, made_apart, regrouped, remembered, split, stages, strided_plan, tile_lists
from sparse_hf.plan.batch import PlanCache
from sparse_hf.plan.hash_order import Chunking, plan_chunks
from tests import oracle

LENGTH = 100


def test_the_last_plans_are_kept_within_their_bytes():
    cache = PlanCache(3, most_bytes=100)
    for key, held in (("a", 40), ("b", 40), ("c", 10)):
        assert cache.put(key, key.upper(), held) == key.upper()
    assert cache.get("a") == "A" and cache.held_bytes == 90
    # the one that was asked for last stays
    cache.put("d", "D", 20)
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"] and cache.held_bytes == 70
    # what is larger than all of them is kept alone, until the next comes
    cache.put("e", "E", 1000)
    assert [cache.get(key) for key in "acde"] == [None, None, None, "E"]
    cache.put("f", "F", 0)
    assert cache.get("e") is None and cache.get("f") == "F"


def test_tables_may_be_made_by_another_thread():
    @remembered
    def maker(plan):
        return threading.get_ident()

    here = build_plan("window(3, 0)", 10)
    assert maker(here) == threading.get_ident()
    with made_apart(True):
        there = build_plan("window(3, 0)", 10)
        assert maker(there) == maker(there) != threading.get_ident()
        # what is made there asks for more without a thread of its own
        assert tile_lists.tile_lists(there, 32, 1, 1).by_query.lines == 1
    assert maker(build_plan("window(3, 0)", 10)) == threading.get_ident()


def test_threads_share_what_was_made_first():
    gate = threading.Barrier(8)

    class Owner:
        @kept
        def table(self):
            return object()

    @remembered
    def table(owner, number: int):
        return object()

    def ask(owner):
        gate.wait()
        return owner.table, *(table(owner, number) for number in range(20))

    with ThreadPoolExecutor(8) as threads:
        for _ in range(50):
            owner = Owner()
            first, *others = threads.map(ask, [owner] * 8)
            assert all(one is other for found in others for one, other in zip(first, found, strict=True))


def test_eight_threads_plan_what_one_does():
    patterns = ["window(9, 9) | marked()", "bigbird(block_size=16)", "stride(7)", "longformer(attention_window=32)"]
    texts = [torch.arange(LENGTH)[None] >= start for start in range(0, 48, 3)]
    right = {
        (p, i): build_plan(p, LENGTH, key_padding_mask=t, marks=~t).to_dense()
        for p in patterns
        for i, t in enumerate(texts)
    }
    plans = {(p, i): build_plan(p, LENGTH, key_padding_mask=t, marks=~t) for p in patterns for i, t in enumerate(texts)}

    def check(seed: int):
        order = torch.randperm(len(plans), generator=torch.Generator().manual_seed(seed)).tolist()
        for key in (list(plans)[i] for i in order):
            plan = plans[key]
            assert torch.equal(plan.to_dense(), right[key])
            tile_lists.tile_lists(plan, 32, 1, 1)
            stages(plan)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(check, range(8)))


@contextmanager
def of_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "float64": lambda: of_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "no grad": torch.no_grad,
}


def tensors_of(value, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors in what is computed from plans."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen:
        return []
    seen.add(id(value))
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    # fields, and what is kept beside them
    inside = vars(value).values() if is_dataclass(value) else inside
    return [t for one in inside for t in tensors_of(one, seen)]


def tables(pattern: str, real: Tensor | None, marks: Tensor | None) -> list[Tensor]:
    """All that is computed from a plan of the pattern."""
    plan = build_plan(pattern, LENGTH, key_padding_mask=real, marks=marks)
    found = [plan.row_offsets, plan.columns, plan.full, joined_rows(plan), split(plan, 2), plan.sequences]
    found += [
        tile_lists.tile_lists(plan, 16, 2, 4),
        stages(plan),
        [piece.runs for s in stages(plan) for piece in s.pieces],
    ]
    strides = read_stride(Pattern.parse(pattern), LENGTH)
    if isinstance(strides, StrideForm):
        found.append(strided_plan(regrouped(strides, LENGTH, (real, None, marks), "cpu"), 2).columns)
    return tensors_of(found)


PLANNED = [
    "window(9, 9) | marked()",
    "longformer(attention_window=32)",
    "bigbird(block_size=16)",
    "stride(7) | first(2)",
    "block_table(16, ((0, 1), (1,), (), (0, 2, 3)))",
    "per_head(chunk(16), window(9, 9), random_blocks(2, 16), chunk(16, 1))",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PLANNED)
@pytest.mark.parametrize("has_batch", [False, True])
def test_tables_are_ordinary_whatever_mode_they_are_made_in(pattern, has_batch, mode):
    given = (None, None)
    if has_batch:
        given = torch.arange(LENGTH) >= torch.tensor([[9], [0]]), torch.arange(LENGTH).expand(2, -1) % 30 == 0
    right = tables(pattern, *given)
    for cached in (blocks._block_matrix, blocks._running_sums):
        cached.cache_clear()
    with MODES[mode]():
        found = tables(pattern, *given)
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        assert not one.is_inference() and not isinstance(one, FakeTensor) and one.device.type == "cpu"
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("mode", ["inference", "fake", "float64", "meta"])
def test_lists_of_chunks_are_ordinary(mode):
    tile_lists._ring_lists.cache_clear()

    def listed():
        plan = plan_chunks(
            None,
            None,
            (1, 2, 64),
            Chunking(16, 1, 0, 16, 0),
            is_causal=True,
            sees_itself=True,
            device=torch.device("cpu"),
        )
        # which token stands where is made in each call, and lists once
        return tensors_of(tile_lists.chunk_lists(plan))

    with MODES[mode]():
        found = listed()
    tile_lists._ring_lists.cache_clear()
    for one, other in zip(found, listed(), strict=True):
        assert not one.is_inference() and not isinstance(one, FakeTensor)
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("pattern", PLANNED)
def test_a_plan_of_inference_serves_training(pattern):
    # of texts so short that they are decoded, and longer ones
    drawn = [torch.randn(2, 4, LENGTH, 16, dtype=torch.float64) for _ in range(3)]
    real = torch.arange(LENGTH) >= torch.tensor([[9], [0]])
    with torch.inference_mode():
        seen = sparse_attention(*drawn, pattern, key_padding_mask=real)
    q, k, v = (t.clone().requires_grad_() for t in drawn)
    out = sparse_attention(q, k, v, pattern, key_padding_mask=real)
    mask = oracle.dense_mask(pattern, LENGTH, LENGTH, real)
    exact = oracle.attention(q, k, v, mask)[0]
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(seen, exact.detach())
    weight = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((exact * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_a_plan_keeps_a_copy_of_the_batch():
    # memory that somebody else writes to: tables are made when they are asked for
    real, marks = torch.ones(2, LENGTH, dtype=torch.bool), torch.zeros(2, LENGTH, dtype=torch.bool)
    real[0, :9], marks[1, 50] = False, True
    plan, right = (build_plan("window(9, 9) | marked()", LENGTH, key_padding_mask=real, marks=marks) for _ in range(2))
    right = right.to_dense()
    real.numpy()[:], marks.numpy()[:] = True, True
    assert torch.equal(plan.to_dense(), right)


@pytest.mark.parametrize("pattern", PLANNED)
def test_a_copy_of_a_plan_is_one(pattern):
    plan = build_plan(pattern, LENGTH)
    tile_lists.tile_lists(plan, 16, 1, 4), stages(plan)
    again = copy.deepcopy(plan)
    assert again.patterns == plan.patterns and torch.equal(again.to_dense(), plan.to_dense())
