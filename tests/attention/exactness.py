"""What exactness tests are made of: tensors, the table of cases, and a comparison with dense attention in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparse_hf import sparse_attention
from sparse_hf.attention import attend, route
from sparse_hf.attention.backend import AttentionCall, Backend
from sparse_hf.attention.composite.strided import Strided
from sparse_hf.attention.dropout import NO_DROPOUT, Dropout
from sparse_hf.attention.scoring import Scoring
from sparse_hf.pattern.base import as_pattern
from sparse_hf.plan import NOTHING, BlockPlan, of_batch
from tests import oracle
from tests.table import LENGTHS, PATTERNS, SCENARIOS, SHAPES, causal_form, scenario

BATCH = 2
# an implementation may err this many times as much as dense attention in the same dtype does, plus a few roundings
SLACK = 4
ROUNDINGS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.float64: 1e-10}
NAMES = ("out", "lse", "grad q", "grad k", "grad v")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

ALL = list(itertools.product(PATTERNS, ("causal", "bidirectional"), LENGTHS, SCENARIOS))
# every pattern meets every scenario both ways in the fast suite, at a length that walks through the table; all in the slow one
FAST = {
    i
    for i, case in enumerate(ALL)
    if LENGTHS.index(case[2]) == (i // len(SCENARIOS) // len(LENGTHS) + i) % len(LENGTHS)
}


@dataclass(frozen=True)
class Thinned:
    """The cases of the table that a backend is given: every `step`-th. The fast suite runs up to `longest_fast` tokens."""

    device: str
    dtype: torch.dtype
    step: int
    longest_fast: int = max(LENGTHS)

    def cases(self, backend: str) -> Iterator:
        """Parameters `(backend, pattern, length, case, shape, dtype, device)`."""
        for i, (pattern, causal, length, name) in list(enumerate(ALL))[:: self.step]:
            marks = [pytest.mark.gpu] if self.device == "cuda" else []
            if i not in FAST or length > self.longest_fast:
                marks.append(pytest.mark.slow)
            text, shape = causal_form(pattern) if causal == "causal" else pattern, SHAPES[i % len(SHAPES)]
            dtype = str(self.dtype).removeprefix("torch.")
            words = backend, i, pattern[:20], causal, length, name, dtype, self.device
            yield pytest.param(
                backend, text, length, name, shape, self.dtype, self.device, id="-".join(map(str, words)), marks=marks
            )


BLOCKS = "chunk(64, 1, 1) | first(64) | last(1, 64)"
DRAWN = f"per_head({', '.join(f'{BLOCKS} | random_blocks(2, 64, {seed})' for seed in range(4))})"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TABLES = {
    "blockwise": (Thinned("cpu", FP32, 1), Thinned("cpu", BF16, 7), Thinned("cuda", FP32, 41)),
    "reference": (Thinned("cpu", FP32, 11), Thinned("cuda", FP32, 97)),
    # TensorFloat-32 is on in no test: fp32 means fp32
    "flex": (Thinned("cuda", BF16, 29), Thinned("cuda", FP32, 29)),
    # what it is for has a table of its own in backends/test_flash.py
    "fa": (Thinned("cuda", BF16, 29),),
    # the interpreter takes seconds for each
    "triton": (
        Thinned("cpu", FP32, 23, longest_fast=63),
        *(Thinned("cuda", dtype, 19) for dtype in (BF16, FP16, FP32)),
    ),
}
# a backend that is not named above: where it cannot run, the reason is shown
OTHER_TABLES = (
    Thinned("cpu", FP32, 11),
    Thinned("cpu", BF16, 77),
    Thinned("cuda", BF16, 29),
    Thinned("cuda", FP32, 29),
)


def exact_cases(backend: str) -> list:
    """The cases of the table that a backend is given."""
    return [case for table in TABLES.get(backend, OTHER_TABLES) for case in table.cases(backend)]


def tensors(shape, q_len: int, kv_len: int, dtype, device="cpu") -> list[Tensor]:
    """Queries, keys and values of `(query heads, key heads, head dim)`."""
    heads, groups, dim = shape
    generator = torch.Generator().manual_seed(kv_len)
    sizes = ((heads, q_len), (groups, kv_len), (groups, kv_len))
    drawn = (torch.randn(BATCH, h, n, dim, generator=generator, dtype=torch.float64) for h, n in sizes)
    # all dtypes see the values that the coarsest can hold
    return [t.to(torch.bfloat16).to(dtype).to(device) for t in drawn]


def leaves(*sizes, dtype=torch.float32) -> list[Tensor]:
    """Normal numbers that gradients are asked of."""
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def call_of(
    q: Tensor, k: Tensor, v: Tensor, pattern, *, key_padding_mask=None, segment_ids=None, marks=None, scoring=None,
    dropout: Dropout = NO_DROPOUT, **rest,
) -> AttentionCall:  # fmt: skip
    """A call as the front door makes it of a pattern, its text, or a plan."""
    scoring = Scoring(q.shape[-1] ** -0.5) if scoring is None else scoring
    if isinstance(pattern, BlockPlan):
        return AttentionCall(q, k, v, None, pattern.q_offset, scoring, dropout, NOTHING, chosen_plan=pattern, **rest)
    batch = of_batch(key_padding_mask, segment_ids, marks)
    return AttentionCall(q, k, v, as_pattern(pattern), k.shape[2] - q.shape[2], scoring, dropout, batch, **rest)


def why_not(backend: str, call: AttentionCall) -> str | None:
    """Why a backend that is asked for by name cannot run a call, as the error says; None if it can."""
    try:
        chosen = route(call, backend)
        if isinstance(chosen, Strided):
            # its parts are asked one by one
            chosen.forward(call)
    except NotImplementedError as error:
        return str(error)
    return None


def batch_of(case: str, length: int, device="cpu") -> tuple[int, dict[str, Tensor | None], dict]:
    """Queries of a scenario, its batch data as `sparse_attention` takes it, and as the oracle does."""
    data = scenario(case, length, BATCH)
    q_len = data.pop("q_len")
    named = {"key_padding_mask": data["real"], "segment_ids": data["documents"], "marks": data["marks"]}
    return q_len, {name: None if t is None else t.to(device) for name, t in named.items()}, data


def oracle_mask(pattern: str, q: Tensor, k: Tensor, data: dict) -> Tensor:
    """The pairs of a pattern of positions."""
    return oracle.dense_mask(pattern, q.shape[2], k.shape[2], **data)


def compare(
    backend: str | Backend, pattern: str, length: int, case: str, shape, dtype, device="cpu", *, wants_lse: bool = True,
    mask_of: Callable[..., Tensor] = oracle_mask,
) -> None:  # fmt: skip
    """Compare a backend, by name through the front door or itself, with dense attention over the pairs of a pattern.

    Args:
        wants_lse: false for backends that give none.
        mask_of: `(pattern, q, k, batch data) -> [B, H, Q, K]`, what to compare with.
    """
    q_len, given, data = batch_of(case, length, device)
    q, k, _ = tensors(shape, q_len, length, torch.float64)
    mask = mask_of(pattern, q, k, data)

    def ours(q, k, v):
        if isinstance(backend, str):
            return sparse_attention(q, k, v, pattern, **given, backend=backend, return_lse=True)
        out, lse = attend(call_of(q, k, v, pattern, **given, wants_lse=wants_lse), backend)
        return out, lse if wants_lse else q.new_zeros(1)

    def dense(q, k, v):
        out, lse = oracle.attention(q, k, v, mask)
        return out, lse if wants_lse else q.new_zeros(1)

    exact = oracle.gradients(dense, *tensors(shape, q_len, length, torch.float64))
    plain = oracle.gradients(dense, *tensors(shape, q_len, length, dtype))
    check(exact, plain, oracle.gradients(ours, *tensors(shape, q_len, length, dtype, device)), dtype)


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


def train_step(pattern: str, backend: str, length: int) -> None:
    """Forward and backward on a GPU."""
    shape = (2, 4, length, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sparse_attention(q, k, v, pattern, backend=backend).sum().backward()


def without_lse(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """As `oracle.gradients` wants it."""
    return lambda q, k, v: (function(q, k, v), q.new_zeros(1))


def compare_choice(text: str, given: list[Tensor], mask: Tensor, dtype, **options) -> None:
    """Compare a pattern that chooses by content with dense attention over the pairs `[B, H, Q, K]` of the very choice."""
    of_cpu = [t.cpu() for t in given]
    right = oracle.gradients(lambda *t: oracle.attention(*t, mask), *(t.double() for t in of_cpu))
    plain = oracle.gradients(lambda *t: oracle.attention(*t, mask), *of_cpu)
    on_device = [t.to(DEVICE) for t in given]
    ours = oracle.gradients(lambda *t: sparse_attention(*t, text, return_lse=True, **options), *on_device)
    check(right, plain, ours, dtype)
