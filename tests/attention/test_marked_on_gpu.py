"""On a GPU, compiled: one CUDA graph for all that batches mark, exact against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
import transformers

from sparse_hf import sparse_attention, sparsify
from sparse_hf.attention.composite import global_tokens as marked
from sparse_hf.attention.scoring import Scoring
from tests import oracle
from tests.attention.test_exactness import check, tensors
from tests.attention.test_marked import marks_of

pytestmark = [
    pytest.mark.gpu,
    # torch records an empty graph to begin with, and warns of it
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

PATTERNS = ["window(64, 64) | marked_keys()", "window(100, 20) | marked()", "window(40, 0) | marked()", "marked_queries()",
            "marked_keys()"]  # fmt: skip
KINDS = ["one", "none", "some", "in one row", "all", "most"]


def skips() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 4, 64), (4, 2, 128), (2, 1, 40)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_graph_holds_any_marks(pattern, shape, dtype):
    torch._dynamo.reset()
    length, before = 641, skips()
    run = torch.compile(
        lambda q, k, v, marks: sparse_attention(q, k, v, pattern, marks=marks, return_lse=True),
        mode="reduce-overhead",
        fullgraph=True,
    )
    for kind in (*KINDS, *KINDS):
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


def test_what_only_kernels_read_is_only_recorded_where_it_is_fast(monkeypatch):
    q, k, v = tensors((4, 4, 64), 300, 300, torch.bfloat16, "cuda")
    marks = marks_of("some", 300).cuda()
    given = "auto", q, k, v, PATTERNS[0], 0, (None, None, marks)
    assert marked.suits(*given, Scoring(1.0), 0.0)
    assert not marked.suits(*given, Scoring(1.0, softcap=3.0), 0.0)
    assert not marked.suits(*given, Scoring(1.0), 0.1)
    assert not marked.suits("triton", *given[1:], Scoring(1.0), 0.0)
    assert not marked.suits(*given[:-1], (marks, None, marks), Scoring(1.0), 0.0)
    monkeypatch.setattr(marked, "UP_TO", 100)
    assert not marked.suits(*given, Scoring(1.0), 0.0)


def test_twenty_runs_are_alike():
    q, k, v = tensors((4, 2, 64), 1000, 1000, torch.bfloat16, "cuda")
    marks = marks_of("some", 1000).cuda()
    run = torch.compile(lambda q, k, v: sparse_attention(q, k, v, PATTERNS[0], marks=marks, return_lse=True))
    first = oracle.gradients(run, q, k, v)
    for _ in range(20):
        assert all(map(torch.equal, oracle.gradients(run, q, k, v), first))


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
    for kind in (*KINDS, *KINDS):
        marks = marks_of(kind, 64).cuda().long()
        torch.compiler.cudagraph_mark_step_begin()
        # gradients are memory of the graph, which the next step writes to
        model.zero_grad(set_to_none=True)
        got = step(ids, global_attention_mask=marks).last_hidden_state
        got.float().sum().backward()
        right = model(ids, global_attention_mask=marks).last_hidden_state
        assert (got - right).float().norm() <= 3e-2 * right.float().norm()
    assert skips() == before
