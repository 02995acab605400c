"""Marks that only kernels look at: any number of them against dense attention in float64.

Kernels are interpreted on a CPU; on a GPU one CUDA graph holds all that batches mark.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from sparse_hf import sparse_attention, sparsify
from sparse_hf.attention import BACKENDS, api, attend
from sparse_hf.attention.composite import global_tokens
from sparse_hf.attention.composite.global_tokens import GlobalTokens
from sparse_hf.attention.composite.marked_places import find
from sparse_hf.attention.dropout import Dropout
from sparse_hf.attention.scoring import Scoring
from tests import oracle
from tests.attention.exactness import ON_GPU, ROUNDINGS, call_of, check, tensors
from tests.attention.plain_kernels import Plain

PATTERNS = [
    "window(9, 14) | marked_keys()",
    "window(20, 0) | marked()",
    "marked_queries()",
    "marked_keys()",
    "marked()",
]
KINDS = ["none", "one", "in one row", "some", "most", "all"]
LENGTH = 70


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


BY_BLOCKS = GlobalTokens(lambda call: BACKENDS["blockwise"])


@pytest.mark.skipif(ON_GPU, reason="kernels are compiled there: test_one_graph_holds_any_marks")
@pytest.mark.parametrize(("pattern", "kind"), list(cases()))
def test_any_number_of_marks_is_exact(pattern, kind, monkeypatch):
    monkeypatch.setattr(global_tokens, "FA2", Plain)
    # the interpreter takes its time for each program
    monkeypatch.setattr("sparse_hf.attention.composite.global_token_kernels.PROGRAMS", 12)
    marks = marks_of(kind, LENGTH)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, LENGTH, 16, generator=generator) for h in (2, 1, 1))
    mask = oracle.dense_mask(pattern, LENGTH, LENGTH, marks=marks)
    exact = oracle.gradients(lambda *t: oracle.attention(*t, mask), *(t.double() for t in (q, k, v)))
    ours = oracle.gradients(lambda *t: attend(call_of(*t, pattern, marks=marks, recorded=True), BY_BLOCKS), q, k, v)
    for got, right in zip(ours, exact, strict=True):
        empty = right == -torch.inf
        assert torch.equal(got == -torch.inf, empty)
        got, right = (torch.where(empty, 0, t.double()) for t in (got, right))
        assert (got - right).abs().max() <= 4 * ROUNDINGS[torch.float32] * right.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["none", "in one row", "some", "all"])
def test_marks_are_found_without_looking(kind):
    marks = marks_of(kind, 40, batch=3)
    places = find(marks)
    for row, found, count in zip(marks, places.index, places.counts.tolist(), strict=True):
        assert found[:count].tolist() == row.nonzero().flatten().tolist() and (found[count:] == -1).all()
    t = torch.randn(3, 2, 40, 4)
    back = places.put(places.take(t), t)
    assert torch.equal(
        back.mT[marks[:, None, None].expand(-1, 2, 4, -1)], t.mT[marks[:, None, None].expand(-1, 2, 4, -1)]
    )


# what is changed in a call, and whether a CUDA graph may record it
CHANGES = {
    "nothing": ({}, True),
    "another pattern": ({"pattern": "chunk(9) | marked()"}, False),
    "a soft cap": ({"scoring": Scoring(1.0, softcap=3.0)}, False),
    "a bias": ({"scoring": Scoring(1.0, bias=torch.zeros(4, 599))}, False),
    "dropout": ({"dropout": Dropout.draw(0.1)}, False),
    "a backend by name": ({"backend": "triton"}, False),
    "padding": ({"key_padding_mask": torch.arange(300).expand(2, -1) > 3}, False),
    "documents": ({"segment_ids": torch.arange(300).expand(2, -1) // 100}, False),
    "32 bits": ({"dtype": torch.float32}, False),
    "wide heads": ({"shape": (4, 4, 264)}, False),
    "heads that are no multiple of 8": ({"shape": (4, 4, 60)}, False),
    "other queries than keys": ({"queries": 200}, False),
    "a long text": ({"most": 100}, False),
    "no marks": ({"marks": None}, True),
}


class OnGpu:
    """A tensor that says that it is on a GPU: decisions look at no more."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, t: torch.Tensor):
        self.t = t

    def __getattr__(self, name: str):
        return getattr(self.t, name)


@pytest.mark.parametrize("name", CHANGES)
def test_what_only_kernels_read_is_only_recorded_where_it_is_fast(name, monkeypatch):
    changes, may_record = CHANGES[name]
    how = {"marks": marks_of("some", 300), **changes}
    shape, queries, dtype = how.pop("shape", (4, 4, 64)), how.pop("queries", 300), how.pop("dtype", torch.bfloat16)
    pattern, backend = how.pop("pattern", "window(64, 64) | marked_keys()"), how.pop("backend", "auto")
    monkeypatch.setattr(global_tokens, "MAX_ELEMENTS", how.pop("most", global_tokens.MAX_ELEMENTS))
    # as of a GPU that has the kernels
    monkeypatch.setattr(global_tokens, "generation", lambda device: 9)
    q, k, v = map(OnGpu, tensors(shape, queries, 300, dtype))
    call = call_of(q, k, v, pattern, **how)
    assert api._may_record(call, str(call.pattern), backend) == may_record
    if call.batch.marks is not None and backend == "auto":
        call.recorded = True
        assert (GlobalTokens(lambda call: None).why_not(call) is None) == may_record
        call.recorded = False
        assert "a CUDA graph may record" in GlobalTokens(lambda call: None).why_not(call)


def on_gpu_alone(test):
    # torch records an empty graph to begin with, and warns of it
    return pytest.mark.gpu(pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")(test))


GPU_PATTERNS = ["window(64, 64) | marked_keys()", "window(100, 20) | marked()", "window(40, 0) | marked()", "marked_queries()",
            "marked_keys()"]  # fmt: skip
GPU_KINDS = ["one", "none", "some", "in one row", "all", "most"]


def skips() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@on_gpu_alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 4, 64), (4, 2, 128), (2, 1, 40)])
@pytest.mark.parametrize("pattern", GPU_PATTERNS)
def test_one_graph_holds_any_marks(pattern, shape, dtype):
    torch._dynamo.reset()
    length, before = 641, skips()
    run = torch.compile(
        lambda q, k, v, marks: sparse_attention(q, k, v, pattern, marks=marks, return_lse=True),
        mode="reduce-overhead",
        fullgraph=True,
    )
    for kind in (*GPU_KINDS, *GPU_KINDS):
        marks = marks_of(kind, length)
        mask = oracle.dense_mask(pattern, length, length, marks=marks)
        exact, plain = (
            oracle.gradients(lambda *t, m=mask: oracle.attention(*t, m), *tensors(shape, length, length, of))
            for of in (torch.float64, dtype)
        )
        marks = marks.cuda()

        def once(*t, marks=marks):
            torch.compiler.cudagraph_mark_step_begin()
            return run(*t, marks)

        ours = oracle.gradients(once, *tensors(shape, length, length, dtype, "cuda"))
        check(exact, plain, ours, dtype, f" with {kind}")
    assert skips() == before


@on_gpu_alone
def test_a_graph_of_what_kernels_do_not_take_is_not_recorded():
    """In 32 bits tables are made of the marks: a graph that held them would go on with those of the first batch."""
    torch._dynamo.reset()
    length, shape = 641, (4, 4, 64)
    run = torch.compile(
        lambda q, k, v, marks: sparse_attention(q, k, v, GPU_PATTERNS[1], marks=marks, return_lse=True),
        mode="reduce-overhead",
        fullgraph=True,
    )
    for kind in ("one", "some", "none", "most", "one", "some"):
        marks = marks_of(kind, length)
        mask = oracle.dense_mask(GPU_PATTERNS[1], length, length, marks=marks)
        exact, plain = (
            oracle.gradients(lambda *t, m=mask: oracle.attention(*t, m), *tensors(shape, length, length, of))
            for of in (torch.float64, torch.float32)
        )
        marks = marks.cuda()

        def once(*t, marks=marks):
            torch.compiler.cudagraph_mark_step_begin()
            return run(*t, marks)

        ours = oracle.gradients(once, *tensors(shape, length, length, torch.float32, "cuda"))
        check(exact, plain, ours, torch.float32, f" with {kind}")


@on_gpu_alone
def test_twenty_runs_are_alike():
    q, k, v = tensors((4, 2, 64), 1000, 1000, torch.bfloat16, "cuda")
    marks = marks_of("some", 1000).cuda()
    run = torch.compile(lambda q, k, v: sparse_attention(q, k, v, GPU_PATTERNS[0], marks=marks, return_lse=True))
    first = oracle.gradients(run, q, k, v)
    for _ in range(20):
        assert all(map(torch.equal, oracle.gradients(run, q, k, v), first))


@on_gpu_alone
def test_longformer_is_recorded_whole():
    torch._dynamo.reset()
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "vocab_size": 50,
    }
    config = transformers.LongformerConfig(**sizes, attention_window=[16, 32], max_position_embeddings=70)
    stock = transformers.LongformerModel(config).cuda().to(torch.bfloat16).eval()
    model, before = sparsify(stock), skips()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    ids = torch.randint(5, 50, (2, 64), device="cuda")
    for kind in (*GPU_KINDS, *GPU_KINDS):
        marks = marks_of(kind, 64).cuda().long()
        torch.compiler.cudagraph_mark_step_begin()
        # gradients are memory of the graph, which the next step writes to
        model.zero_grad(set_to_none=True)
        got = step(ids, global_attention_mask=marks).last_hidden_state
        got.float().sum().backward()
        right = model(ids, global_attention_mask=marks).last_hidden_state
        assert (got - right).float().norm() <= 3e-2 * right.float().norm()
    assert skips() == before
