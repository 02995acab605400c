"""`triton` against dense attention in float64: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention.backends.triton import backend as triton
from sparse_hf.attention.hashed import chunks_on_triton as chunk_kernels
from sparse_hf.attention.hashed import hash_order as hashed
from sparse_hf.attention.hashed.reformer import chunked_attention
from sparse_hf.plan import tile_lists as lists
from sparse_hf.plan.hash_order import Chunking, plan_chunks
from tests import oracle
from tests.attention.test_exactness import DRAWN, cases, compare, tensors
from tests.table import PATTERNS, SCENARIOS, SHAPES, causal_form

# each entry but the first of a line is then a segment of its own
TINY_PROGRAMS = {
    "HOST_BOUND_TILES": 0, "PROGRAM_TILES": 1, "PROGRAM_TILES_OVER_MEAN": 0, "SEGMENT_TILES_OVER_ROOT": 0
}  # fmt: skip
on_gpu = torch.cuda.is_available()
DEVICE = "cuda" if on_gpu else "cpu"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels on the CPU too; tests/conftest.py has Triton interpret them there."""
    monkeypatch.setattr(triton, "DEVICES", {DEVICE})


def few():
    """Every pattern once, causal or not, in a scenario and a shape that walk through the table."""
    for i, pattern in enumerate(PATTERNS):
        text = causal_form(pattern) if i // 2 % 2 else pattern
        case, shape = SCENARIOS[i // 2 % len(SCENARIOS)], SHAPES[(i // 3) % len(SHAPES)]
        # the interpreter takes seconds for each
        marks = pytest.mark.slow if i % 2 else ()
        yield pytest.param(text, case, shape, id=f"{pattern[:30]}-{case}", marks=marks)


@pytest.mark.parametrize(("pattern", "case", "shape"), list(few()))
def test_exact(pattern, case, shape):
    compare("triton", pattern, 100, case, shape, torch.float32, DEVICE)


@pytest.mark.parametrize("pattern", ["window(20, 20) | marked()", "window(40, 0) | first(4) & window(None, 0)"])
def test_exact_in_half_precision(pattern):
    # the interpreter of triton 3.7 gets products of bfloat16 wrong; a GPU has them below
    compare("triton", pattern, 100, "packed_and_padded", (4, 2, 64), torch.float16, DEVICE)


@pytest.mark.parametrize("pattern", [pytest.param("window(20, 20) | first(2)", marks=pytest.mark.slow), DRAWN])
def test_exact_where_tiles_have_many_entries(pattern, monkeypatch):
    for name, value in TINY_PROGRAMS.items():
        monkeypatch.setattr(lists, name, value)
    compare("triton", pattern, 200, "left_padding", (4, 2, 16), torch.float32, DEVICE)


@pytest.mark.parametrize("block_size", [5, 16, 96, 128])
def test_plans_in_blocks_of_any_size(block_size):
    q, k, v = tensors((2, 1, 16), 100, 100, torch.float32, DEVICE)
    plan = build_plan("window(9, 30) | first(2)", 100, block_size=block_size, device=DEVICE)
    got, right = (sparse_attention(q, k, v, plan, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(23))
def test_exact_all_over_the_table(pattern, length, case, shape):
    compare("triton", pattern, length, case, shape, torch.float32, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(19))
def test_exact_when_compiled(pattern, length, case, shape, dtype):
    compare("triton", pattern, length, case, shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 24, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_exact_at_every_head_dim(head_dim, dtype):
    compare("triton", "window(90, 30) | first(3)", 1000, "packed", (4, 2, head_dim), dtype, "cuda")


def test_soft_cap_and_dropout_are_those_of_other_backends():
    q, k, v = tensors((4, 2, 32), 150, 150, torch.float32, DEVICE)

    def run(backend):
        torch.manual_seed(3)
        how = {"softcap": 2.0, "dropout": 0.3, "backend": backend, "return_lse": True}
        return oracle.gradients(lambda *t: sparse_attention(*t, "window(30, 9) | first(2)", **how), q, k, v)

    for one, other in zip(run("triton"), run("blockwise"), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("trial", [*range(4), *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 12))])
def test_chunks_in_hash_order_are_those_of_plain_torch(trial, monkeypatch):
    generator = torch.Generator().manual_seed(trial)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    batch, heads, length, rounds = draw(1, 3), draw(1, 4), draw(20, 130), 1 + trial % 3
    size = (16, 32)[draw(0, 2)]
    chunking = Chunking(size, draw(0, 2), draw(0, 2), (size, 2 * size)[draw(0, 2)], draw(0, 2) * size)
    how = {"is_causal": bool(draw(0, 2)), "sees_itself": bool(draw(0, 2)), "dropout": 0.2 * (trial % 2), "scale": 0.3}
    how["buckets"] = torch.randint(6, (batch, heads, rounds, length), generator=generator).to(DEVICE) if trial else None
    if trial % 3:
        real = torch.arange(length) >= torch.randint(length // 2, (batch, 1), generator=generator)
        how["real"] = (real if trial % 2 else real.flip(1)).to(DEVICE)
    given = [torch.randn(batch, heads, length, 20, generator=generator).to(DEVICE) for _ in range(3)]

    def run(devices):
        monkeypatch.setattr(triton, "DEVICES", devices)
        torch.manual_seed(5)
        return oracle.gradients(lambda *t: chunked_attention(*t, chunking, **how), *given)

    for one, other in zip(run({DEVICE}), run(set()), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.gpu
def test_twenty_runs_are_bitwise_equal():
    q, k, v = tensors((4, 2, 64), 1000, 1000, torch.bfloat16, "cuda")
    runs = [
        oracle.gradients(
            lambda *t: sparse_attention(*t, "window(64, 64) | first(2)", backend="triton", return_lse=True), q, k, v
        )
        for _ in range(20)
    ]
    for later in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], later, strict=True))


def test_chunks_that_see_many_are_exact():
    q, k, v = tensors((1, 1, 16), 64, 64, torch.float32, DEVICE)
    chunking = Chunking(16, 140, 0, 16, 0)
    plan = plan_chunks(None, None, tuple(q.shape[:3]), chunking, is_causal=True, sees_itself=True, device=q.device)
    assert chunk_kernels.suit(q, v, plan)
    got, right = hashed.attend(q, k, v, plan, 0.25, 0.0, None), hashed.look(q, k, v, plan, 0.25)
    for one, other in zip(got, right, strict=False):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
