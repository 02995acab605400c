"""FlexAttention is compiled once for all lengths: traced and run on a CPU, where it has gradients only uncompiled."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_hf import build_plan
from sparse_hf.attention import BACKENDS
from sparse_hf.attention.backends import flex
from sparse_hf.attention.scoring import Scoring
from tests.attention.exactness import call_of, tensors, train_step

# of five and seven blocks: torch takes sizes of 1 for constants, and equal ones (batch, heads, blocks to a row) for one
LENGTHS = (600, 880)


@pytest.fixture
def compiled(monkeypatch):
    """Counts what is compiled in `frame_count`. Nothing is generated from what is traced: FlexAttention has no lse on CPUs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(flex._flex, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: function)
    monkeypatch.setattr(flex, "_options", lambda q: None)
    yield counter
    torch._dynamo.reset()


def batch(kind: str, length: int) -> dict:
    places = torch.arange(length).expand(2, -1)
    return {
        "plain": {},
        "padded": {"key_padding_mask": places >= torch.tensor([[length // 3], [0]])},
        "packed": {"segment_ids": places * 3 // length},
        "marked": {"marks": places % 40 == 0},
    }[kind]


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("window(40, 40) | first(2)", "padded"),
        ("chunk(50)", "packed"),
        pytest.param("window(40, 0)", "plain", marks=pytest.mark.slow),
        pytest.param("window(40, 40) | marked()", "marked", marks=pytest.mark.slow),
        pytest.param("bigbird(block_size=16)", "plain", marks=pytest.mark.slow),
        pytest.param("ring(24, 1, 1)", "padded", marks=pytest.mark.slow),
        pytest.param(
            "per_head(window(40, 0), stride(3) & window(None, 0), window(20, 0), window(40, 0))",
            "plain",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_kernel_for_all_lengths(pattern, kind, compiled):
    calls = []
    for length in LENGTHS:
        plan = build_plan(pattern, length, **batch(kind, length))
        compare(plan, Scoring(0.2), tensors((4, 2, 32), length, length, torch.float32))
        calls.append(len(flex.pieces(plan)))
    # a piece of its own for long rows or columns has other tables, but not at every length
    assert compiled.frame_count <= max(calls)


def test_scores_with_a_bias_and_a_cap_have_one_kernel_for_all_lengths(compiled):
    for length in LENGTHS:
        bias = torch.randn(4, 2 * length - 1)
        compare(
            build_plan("window(40, 0)", length),
            Scoring(0.2, 5.0, bias),
            tensors((4, 2, 32), length, length, torch.float32),
        )
    assert compiled.frame_count == 1


def compare(plan, scoring: Scoring, qkv):
    with torch.no_grad():
        found = BACKENDS["flex"].forward(call_of(*qkv, plan, scoring=scoring))
        right = BACKENDS["reference"].forward(call_of(*qkv, plan, scoring=scoring))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["window(100, 0)", "window(100, 100) | first(2)", "bigbird(block_size=64)"])
def test_another_length_compiles_nothing(pattern):
    for length in (1001, 1024):
        train_step(pattern, "flex", length)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (1777, 2048, 4096):
        train_step(pattern, "flex", length)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
