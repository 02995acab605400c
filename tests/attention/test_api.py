"""What `sparse_attention` takes and refuses, and patterns and backends that users bring."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sparse_hf import Pattern, PerHead, Window, build_plan, sparse_attention
from sparse_hf.attention import BACKENDS, route
from sparse_hf.attention.backend import AttentionCall, Backend, Given, Gradients, Results
from tests import oracle
from tests.attention.exactness import call_of, compare, tensors
from tests.table import SCENARIOS


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
        ({"key_padding_mask": torch.ones(3, 10)}, ValueError, "the batch data has 3 rows; q has 1"),
        ({"segment_ids": torch.zeros(1, 11)}, ValueError, r"segment_ids has shape \(1, 11\).* must be \[batch, 10\]"),
        ({"marks": torch.zeros(10)}, ValueError, r"marks has shape \(10,\).* must be \[batch, 10\]"),
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
    qkv_pattern = [given.pop(name) for name in ("q", "k", "v", "pattern")]
    with pytest.raises(error, match=message):
        sparse_attention(*qkv_pattern, **given)


class Scaled(Backend):
    """A backend of a user's own, with gradients of its own: dense attention by products of whole matrices."""

    name = "scaled"

    def why_not(self, call: AttentionCall) -> str | None:
        return None if call.scoring.is_plain and not call.dropout else "it knows plain scores only"

    def forward(self, call: AttentionCall) -> Results:
        scores, v = self._scores(call)
        sees = scores.isfinite().any(-1)
        lse = torch.where(sees[..., None], scores, 0).logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        return (weights @ v).to(call.q.dtype), lse.masked_fill(~sees, -torch.inf)

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        scores, v = self._scores(call)
        repeats, lse = call.q.shape[1] // call.k.shape[1], given.lse.where(given.lse > -torch.inf, torch.inf)
        weights = (scores - lse[..., None]).exp()
        change = weights * (given.some_grad_out @ v.mT - (given.some_grad_out * given.out).sum(-1, keepdim=True))
        if given.grad_lse is not None:
            change = change + weights * given.grad_lse[..., None]
        change = change * call.scoring.scale
        k = call.k.repeat_interleave(repeats, 1)
        of_keys = (t.unflatten(1, (-1, repeats)).sum(2) for t in (change.mT @ call.q, weights.mT @ given.some_grad_out))
        return change @ k, *of_keys, None

    @staticmethod
    def _scores(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        mask = call.blocks.to_dense()[:, list(call.blocks.heads) or [0]]
        k, v = (t.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1) for t in (call.k, call.v))
        return (call.q @ k.mT * call.scoring.scale).masked_fill(~mask, -torch.inf), v


@dataclass(frozen=True)
class EveryThird(Pattern):
    """A pattern of a user's own."""

    offset: int

    def allows(self, q, k, marks=None):
        return (q >= 0) & (k % 3 == self.offset)

    def blocks(self, q0, q1, k0, k1, marks=None):
        return torch.ones_like(q0 + k0, dtype=torch.int8)

    def reachable(self, k, q):
        return self.allows(q, k)


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setitem(BACKENDS, Scaled.name, Scaled())


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize(
    "pattern",
    [EveryThird(1), EveryThird(2) | Window(5, 0), Window(9, 9), PerHead(*[EveryThird(i % 3) for i in range(4)])],
    ids=str,
)
def test_a_users_own_backend_is_exact(pattern, case):
    compare(Scaled.name, str(pattern), 100, case, (4, 2, 16), torch.float32)


@pytest.mark.usefixtures("scaled")
def test_a_users_own_backend_is_compiled_regrouped_and_refuses():
    torch._dynamo.reset()
    drawn = tensors((4, 2, 16), 608, 608, torch.float64)
    mask = oracle.dense_mask("stride(16)", 608, 608)
    exact = oracle.gradients(lambda *t: oracle.attention(*t, mask), *drawn)

    def attend(q, k, v):
        return sparse_attention(q, k, v, "stride(16)", backend=Scaled.name, return_lse=True)

    # tokens of a stride side by side are what it is given
    assert route(call_of(*drawn, "stride(16)"), Scaled.name).name == "strided"
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        for one, other in zip(oracle.gradients(function, *drawn), exact, strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(NotImplementedError, match="backend 'scaled' cannot run this call: it knows plain scores only"):
        sparse_attention(*drawn, "window(3, 3)", backend=Scaled.name, softcap=2.0)
    with pytest.raises(ValueError, match="backend is 'fast'; the known ones are .*, 'scaled'"):
        sparse_attention(*drawn, "window(3, 3)", backend="fast")
    # "auto" takes what its ladder names
    assert route(call_of(*drawn, "window(3, 3)"), "auto").name == "blockwise"
