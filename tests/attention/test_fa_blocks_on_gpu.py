"""Block lists of `fa` on a GPU with flash-attn-4: exactness, runs that repeat, and that no length compiles again."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention.backends.flash import backend as fa
from sparse_hf.attention.backends.flash import window_kernels as flash
from sparse_hf.plan import tile_lists as lists
from tests import oracle
from tests.attention.test_exactness import compare, tensors
from tests.attention.test_fa_on_gpu import poison
from tests.table import causal_form

pytestmark = pytest.mark.gpu

# (query heads, key heads, head dim): a kernel is compiled for each, in both directions
SHAPES = [(4, 2, 64), (4, 4, 128)]
PATTERNS = [
    "bigbird(block_size=64)",
    "summary(16, 3) | window(0, 0)",
    "ring(50, 2)",
    "fixed(128, 8)",
    "window(60, 60) & stride(3)",
    "window(30, 5) | marked() | chunk(50)",
    "chunk(24, 2, 1)",
    "first(300) | last(200) | chunk(64)",
    "block_table(128, ((0, 1), (1,), (), (0, 2, 3), (4, 1), (5,), (6, 0), (7,), (3, 8), (9,)))",
    "per_head(chunk(9), window(60, 60) & stride(3), random_blocks(2, 64, 1), first(4) | chunk(50))",
]
CASES = ["plain", "last_queries", "left_padding", "right_padding", "packed", "packed_and_padded"]


@pytest.fixture(autouse=True)
def _needs_flash_attn_4():
    reason = flash.FA4.refuses(torch.empty(1, device="cuda"))
    if reason or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(reason or "lists of blocks are for compute capability 9")


def run(*args) -> None:
    poison()
    compare("fa", *args, device="cuda")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_are_exact(pattern, case):
    index = PATTERNS.index(pattern) + CASES.index(case)
    text = causal_form(pattern) if index // 2 % 2 else pattern
    run(text, [1000, 1153, 257, 1280][index % 4], case, SHAPES[index % 2], torch.bfloat16)


@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_lists_are_exact_in_float16(pattern):
    run(pattern, 1153, "packed", (4, 2, 64), torch.float16)


@pytest.mark.parametrize("length", [1, 63, 100, 128, 129])
def test_short_texts_are_exact(length):
    run("chunk(50)", length, "plain", (4, 2, 64), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 4, 32), (4, 1, 32), (6, 2, 96)])
def test_lists_are_exact_at_other_head_dims(shape):
    run("window(60, 60) & stride(3)", 1000, "left_padding", shape, torch.bfloat16)


@pytest.mark.parametrize(
    "pattern", ["first(300) | last(200) | chunk(64)", "per_head(chunk(9), first(1), stride(7), chunk(50))"]
)
def test_long_lines_are_merged_exactly(pattern, monkeypatch):
    monkeypatch.setattr(lists, "PROGRAM_TILES", 2)
    monkeypatch.setattr(lists, "HOST_BOUND_TILES", 0)
    monkeypatch.setattr(lists, "PROGRAM_TILES_OVER_MEAN", 0.5)
    monkeypatch.setattr(lists, "SEGMENT_TILES_OVER_ROOT", 0)
    # a length of its own: plans are kept
    run(pattern, 1171, "packed_and_padded", (4, 2, 64), torch.bfloat16)


def repeated(pattern: str, times: int = 20):
    q, k, v = tensors((4, 2, 64), 1000, 1000, torch.bfloat16, "cuda")
    function = lambda *t: sparse_attention(*t, pattern, backend="fa", return_lse=True)  # noqa: E731
    return [oracle.gradients(function, q, k, v) for _ in range(times)]


def test_twenty_runs_differ_by_roundings_at_most():
    # gradients are added up in no fixed order; outputs and lse are the same each time
    runs = repeated("bigbird(block_size=64)")
    for later in runs[1:]:
        for one, other in zip(runs[0][:2], later[:2], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(runs[0][2:], later[2:], strict=True):
            assert (one.float() - other.float()).abs().max() <= 2**-7 * one.float().abs().max()


def test_where_torch_is_told_to_repeat_lists_are_refused():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(NotImplementedError, match="in no fixed order"):
            repeated("chunk(50)", 1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_lengths_and_patterns_compile_nothing():
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def sizes():
        return [len(function.compile_cache.cache) for function in (_flash_attn_fwd, _flash_attn_bwd)]

    def step(pattern, length, batch=2):
        q, k, v = (t[:batch].requires_grad_() for t in tensors((4, 2, 64), length, length, torch.bfloat16, "cuda"))
        sparse_attention(q, k, v, pattern, backend="fa").sum().backward()

    step("chunk(50)", 1000)
    before = sizes()
    for pattern, length, batch in (
        ("chunk(50)", 1153, 2),
        ("bigbird(block_size=64)", 4000, 1),
        ("fixed(128, 8)", 700, 2),
    ):
        step(pattern, length, batch)
    assert sizes() == before


def test_only_lse_has_a_gradient():
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 64), 257, 257, torch.bfloat16, "cuda"))
    mask = oracle.dense_mask("chunk(50)", 257, 257)
    exact = oracle.attention(*(t.double().cpu() for t in (q, k, v)), mask)[1].sum()
    right = torch.autograd.grad(exact, (q, k, v), allow_unused=True)
    got = torch.autograd.grad(
        sparse_attention(q, k, v, "chunk(50)", backend="fa", return_lse=True)[1].sum(), (q, k, v), allow_unused=True
    )
    for one, other in zip(got[:2], right[:2], strict=True):
        torch.testing.assert_close(one.cpu().float(), other.cpu().float(), atol=2e-2, rtol=2e-2)


def test_a_compiled_model_runs_lists():
    def loss(q, k, v):
        return sparse_attention(q, k, v, "chunk(50)", backend="fa").float().square().sum()

    leaves = [t.requires_grad_() for t in tensors((4, 2, 64), 640, 640, torch.bfloat16, "cuda")]
    right = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_lists_are_chosen_where_they_were_faster():
    def chosen(pattern: str, length: int) -> bool:
        q = torch.empty(1, 16, length, 128, device="cuda", dtype=torch.bfloat16)
        return fa.is_fastest(q, build_plan(pattern, length, device="cuda"))

    assert chosen("bigbird(block_size=128)", 65_536)
    assert not chosen("bigbird(block_size=128)", 16_384) and not chosen("chunk(50)", 65_536)
