"""Marks that only kernels look at: every number of them against dense attention in float64, with kernels interpreted on a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparse_hf.attention.backends.blockwise import backend as blockwise
from sparse_hf.attention.backends.flash import window_kernels as flash
from sparse_hf.attention.composite import global_tokens as marked
from sparse_hf.attention.scoring import Scoring
from sparse_hf.pattern.forms import read_marked
from sparse_hf.plan import build_plan
from tests import oracle
from tests.attention.test_exactness import ROUNDINGS
from tests.attention.test_fa import Plain

PATTERNS = [
    "window(9, 14) | marked_keys()",
    "window(20, 0) | marked()",
    "marked_queries()",
    "marked_keys()",
    "marked()",
]
KINDS = ["none", "one", "in one row", "some", "most", "all"]
LENGTH = 70
on_gpu = torch.cuda.is_available()


def marks_of(kind: str, length: int, batch: int = 2) -> torch.Tensor:
    """Other numbers of marks in each row, at places that the two rows do not share."""
    drawn = torch.rand(batch, length, generator=torch.Generator().manual_seed(1))
    one = torch.arange(length) == torch.arange(batch)[:, None] * 3
    return {"none": drawn > 1, "one": one, "in one row": one & (torch.arange(batch) == 1)[:, None], "some": drawn < 0.1,
            "most": drawn < 0.7, "all": drawn < 1}[kind]  # fmt: skip


def cases():
    """Every pattern and every number of marks in the fast suite, all of both in the slow one: the interpreter takes its time."""
    for i, (pattern, kind) in enumerate(itertools.product(PATTERNS, KINDS)):
        yield pytest.param(pattern, kind, marks=() if (i + i // len(KINDS)) % 3 == 0 else pytest.mark.slow)


class Operator(torch.autograd.Function):
    """As the operator of torch calls it."""

    @staticmethod
    def forward(ctx, q, k, v, pattern, marks):
        parts = read_marked(pattern)
        window = None if parts.window is None else build_plan(parts.window, q.shape[2])
        ctx.plan, ctx.runs, ctx.scoring = (
            marked.Marked(parts, window, marks),
            marked.Composition(blockwise),
            Scoring(0.25),
        )
        out, lse = ctx.runs.attend(q, k, v, ctx.plan, ctx.scoring, 0.0, None)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        grads = ctx.runs.backward(*ctx.saved_tensors, grad_out, grad_lse, ctx.plan, ctx.scoring, 0.0, None)
        return *grads[:3], None, None


@pytest.mark.skipif(on_gpu, reason="kernels are compiled there: tests/attention/test_marked_on_gpu.py")
@pytest.mark.parametrize(("pattern", "kind"), list(cases()))
def test_any_number_of_marks_is_exact(pattern, kind, monkeypatch):
    monkeypatch.setattr(flash, "FA2", Plain)
    # the interpreter takes its time for each program
    monkeypatch.setattr("sparse_hf.attention.composite.global_tokens_kernels.PROGRAMS", 12)
    marks = marks_of(kind, LENGTH)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, LENGTH, 16, generator=generator) for h in (2, 1, 1))
    mask = oracle.dense_mask(pattern, LENGTH, LENGTH, marks=marks)
    exact = oracle.gradients(lambda *t: oracle.attention(*t, mask), *(t.double() for t in (q, k, v)))
    ours = oracle.gradients(lambda *t: Operator.apply(*t, pattern, marks), q, k, v)
    for got, right in zip(ours, exact, strict=True):
        empty = right == -torch.inf
        assert torch.equal(got == -torch.inf, empty)
        got, right = (torch.where(empty, 0, t.double()) for t in (got, right))
        assert (got - right).abs().max() <= 4 * ROUNDINGS[torch.float32] * right.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["none", "in one row", "some", "all"])
def test_marks_are_found_without_looking(kind):
    marks = marks_of(kind, 40, batch=3)
    places = marked.find(marks)
    for row, found, count in zip(marks, places.index, places.counts.tolist(), strict=True):
        assert found[:count].tolist() == row.nonzero().flatten().tolist() and (found[count:] == -1).all()
    t = torch.randn(3, 2, 40, 4)
    back = places.put(places.take(t), t)
    assert torch.equal(
        back.mT[marks[:, None, None].expand(-1, 2, 4, -1)], t.mT[marks[:, None, None].expand(-1, 2, 4, -1)]
    )
