"""Outputs, lse and gradients of every backend against dense attention over the same pairs in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparse_hf import sparse_attention
from tests import oracle
from tests.table import LENGTHS, PATTERNS, SCENARIOS, SHAPES, causal_form, scenario

BATCH = 2
# an implementation may err this many times as much as dense attention in the same dtype does, plus a few roundings
SLACK = 4
ROUNDINGS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
NAMES = ("out", "lse", "grad q", "grad k", "grad v")

ALL = list(itertools.product(PATTERNS, ("causal", "bidirectional"), LENGTHS, SCENARIOS))
# every pattern meets every scenario both ways in the fast suite, at a length that walks through the table; all in the slow one
FAST = {
    i
    for i, case in enumerate(ALL)
    if LENGTHS.index(case[2]) == (i // len(SCENARIOS) // len(LENGTHS) + i) % len(LENGTHS)
}


def cases(step: int = 1, shift: int = 0):
    return [
        pytest.param(
            causal_form(pattern) if causal == "causal" else pattern, length, name, SHAPES[i % len(SHAPES)],
            id=f"{i}-{pattern[:20]}-{causal}-{length}-{name}", marks=() if i in FAST else pytest.mark.slow,
        )
        for i, (pattern, causal, length, name) in enumerate(ALL) if i % step == shift
    ]  # fmt: skip


def tensors(shape, q_len: int, kv_len: int, dtype, device="cpu"):
    heads, groups, dim = shape
    generator = torch.Generator().manual_seed(kv_len)
    sizes = ((heads, q_len), (groups, kv_len), (groups, kv_len))
    drawn = (torch.randn(BATCH, h, n, dim, generator=generator, dtype=torch.float64) for h, n in sizes)
    # all dtypes see the values that the coarsest can hold
    return [t.to(torch.bfloat16).to(dtype).to(device) for t in drawn]


def compare(backend: str, pattern: str, length: int, case: str, shape, dtype, device="cpu"):
    batch = scenario(case, length, BATCH)
    q_len = batch.pop("q_len")
    mask = oracle.dense_mask(pattern, q_len, length, **batch)
    exact = oracle.gradients(
        lambda q, k, v: oracle.attention(q, k, v, mask), *tensors(shape, q_len, length, torch.float64)
    )
    plain = oracle.gradients(lambda q, k, v: oracle.attention(q, k, v, mask), *tensors(shape, q_len, length, dtype))
    given = {"key_padding_mask": batch["real"], "segment_ids": batch["documents"], "marks": batch["marks"]}
    given = {name: None if value is None else value.to(device) for name, value in given.items()}
    ours = oracle.gradients(
        lambda q, k, v: sparse_attention(q, k, v, pattern, **given, backend=backend, return_lse=True),
        *tensors(shape, q_len, length, dtype, device),
    )
    check(exact, plain, ours, dtype)


def check(exact, plain, ours, dtype, where: str = "") -> None:
    """Out, lse and gradients `ours` against those in float64, given what dense attention in the same dtype makes of them."""
    for name, right, dense, got in zip(NAMES, exact, plain, ours, strict=True):
        assert not got.isnan().any(), f"{name} has NaN{where}"
        got = got.cpu().double()
        empty = right == -torch.inf
        assert torch.equal(got == -torch.inf, empty), f"{name}: other rows are empty{where}"
        right, got, dense = (torch.where(empty, 0, t.double()) for t in (right, got, dense))
        scale = right.abs().max().clamp(min=1)
        error, allowed = (got - right).abs().max() / scale, (dense - right).abs().max() / scale
        assert error <= SLACK * allowed + ROUNDINGS[dtype], (
            f"{name} errs by {error:.1e}, dense attention by {allowed:.1e}{where}"
        )


@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases())
def test_blockwise_is_exact(pattern, length, case, shape):
    compare("blockwise", pattern, length, case, shape, torch.float32)


@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(7))
def test_blockwise_is_exact_in_bfloat16(pattern, length, case, shape):
    compare("blockwise", pattern, length, case, shape, torch.bfloat16)


@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(11))
def test_reference_is_exact(pattern, length, case, shape):
    compare("reference", pattern, length, case, shape, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(29))
def test_flex_is_exact(pattern, length, case, shape, dtype):
    # TensorFloat-32 is on in no test: fp32 means fp32
    compare("flex", pattern, length, case, shape, dtype, "cuda")


BLOCKS = "chunk(64, 1, 1) | first(64) | last(1, 64)"
DRAWN = f"per_head({', '.join(f'{BLOCKS} | random_blocks(2, 64, {seed})' for seed in range(4))})"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", ["plain", "right_padding", "left_padding", "last_queries"])
@pytest.mark.parametrize(("pattern", "length"), [(DRAWN, 700), (BLOCKS, 2000), (causal_form(BLOCKS), 1000)])
def test_what_is_chosen_on_a_gpu_is_exact_on_bigbirds_blocks(pattern, length, case, dtype):
    compare("auto", pattern, length, case, (4, 2, 64), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), cases(41))
def test_blockwise_is_exact_on_a_gpu(pattern, length, case, shape):
    compare("blockwise", pattern, length, case, shape, torch.float32, "cuda")


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_rows_that_see_nothing_give_zero_and_no_nan(backend):
    q, k, v = tensors((4, 2, 32), 100, 100, torch.float32)
    real = torch.ones(BATCH, 100, dtype=torch.bool)
    real[0, :40] = False
    real[1] = False
    out, lse, *grads = oracle.gradients(
        lambda q, k, v: sparse_attention(
            q, k, v, "window(5, 0)", key_padding_mask=real, backend=backend, return_lse=True
        ),
        q, k, v,
    )  # fmt: skip
    assert (out[0, :, :40] == 0).all() and (out[1] == 0).all()
    assert (lse[0, :, :40] == -torch.inf).all() and (lse[1] == -torch.inf).all()
    assert (grads[0][0, :, :40] == 0).all() and all((g[1] == 0).all() for g in grads)
    assert not any(t.isnan().any() for t in (out, *grads))
