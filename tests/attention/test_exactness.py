"""Outputs, lse and gradients of every backend against dense attention over the same pairs in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.attention import BACKENDS, route
from sparse_hf.attention.autograd import AutogradBackend
from sparse_hf.attention.backends.sdpa.dense import is_causal
from sparse_hf.attention.composite.content import ContentPairs, DenseContentPairs
from sparse_hf.attention.composite.strided import Strided
from sparse_hf.attention.dispatch import DECODE, DENSE
from sparse_hf.pattern import Pattern
from sparse_hf.pattern.forms import StrideForm, read_stride
from tests import oracle
from tests.attention import hashes
from tests.attention.exactness import (
    ALL,
    BATCH,
    BF16,
    BLOCKS,
    DRAWN,
    FP32,
    ON_GPU,
    SHAPES,
    TABLES,
    batch_of,
    call_of,
    compare,
    exact_cases,
    tensors,
    why_not,
)
from tests.table import PATTERNS, SCENARIOS, causal_form


@pytest.mark.cross(("backend", "case"), "pattern", "length", "shape", "dtype", "device")
@pytest.mark.parametrize(
    ("backend", "pattern", "length", "case", "shape", "dtype", "device"),
    [case for name in BACKENDS for case in exact_cases(name)],
)
def test_exact(backend, pattern, length, case, shape, dtype, device, request):
    if backend == "triton":
        request.getfixturevalue("interpreted")
    reason = refusal(backend, pattern, length, case, shape, dtype, device)
    if reason:
        pytest.skip(reason)
    compare(backend, pattern, length, case, shape, dtype, device)


def refusal(backend: str, pattern, length, case, shape, dtype, device) -> str | None:
    """Why a backend cannot run a case."""
    q_len, given, _ = batch_of(case, length, device)
    return why_not(backend, call_of(*tensors(shape, q_len, length, dtype, device), pattern, **given))


def runs_some_case(backend: str, device: str) -> str | None:
    """None if a backend runs one of its cases on a device, else the reasons."""
    reasons = set()
    for case in exact_cases(backend):
        if case.values[-1] == device:
            reason = refusal(*case.values)
            if reason is None:
                return None
            reasons.add(reason)
    return f"{backend} runs nothing on {device}: {reasons or 'it has no cases'}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_compared_somewhere(backend, interpreted):
    needs_gpu = backend in TABLES and not any(table.device == "cpu" for table in TABLES[backend])
    if needs_gpu and not ON_GPU:
        # a GPU is asked below
        assert any(case.values[-1] == "cuda" for case in exact_cases(backend))
    else:
        assert runs_some_case(backend, "cuda" if needs_gpu or backend == "triton" and ON_GPU else "cpu") is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_compared_on_a_gpu(backend):
    assert runs_some_case(backend, "cuda") is None


class Toy(AutogradBackend):
    """A backend that somebody adds: dense, and for no packed documents."""

    name = "toy"
    calls = 0

    def why_not(self, call):
        return "it knows no documents" if call.blocks.sequences.start is not None else None

    def forward(self, call):
        Toy.calls += 1
        mask = call.blocks.to_dense()[:, list(call.blocks.heads) or [0]]
        k, v = (t.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1) for t in (call.k, call.v))
        scores = (call.q.float() @ k.float().mT * call.scoring.scale).masked_fill(~mask, -1e30)
        sees = mask.any(-1)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp() * sees[..., None]
        return (weights @ v.float()).to(call.q.dtype), lse.masked_fill(~sees, -torch.inf)


def test_a_backend_that_is_added_is_compared_too(monkeypatch):
    monkeypatch.setitem(BACKENDS, Toy.name, Toy())
    cases = [case for name in BACKENDS for case in exact_cases(name) if name == Toy.name]
    assert {case.values[1] for case in cases} >= {pattern for pattern in PATTERNS if "per_head" in pattern}
    on_cpu = [case.values for case in cases if case.values[-1] == "cpu" and case.values[5] == FP32]
    runs = [values for values in on_cpu if refusal(*values) is None]
    assert {refusal(*values) for values in on_cpu} == {
        None,
        "backend 'toy' cannot run this call: it knows no documents",
    }
    for values in runs[::16]:
        compare(*values)
    assert runs_some_case(Toy.name, "cpu") is None and Toy.calls >= len(runs[::16])


def test_a_backend_that_is_wrong_is_found(monkeypatch):
    class Wrong(Toy):
        def forward(self, call):
            out, lse = super().forward(call)
            return out * 1.001, lse

    monkeypatch.setitem(BACKENDS, Toy.name, Wrong())
    with pytest.raises(AssertionError, match="out errs by"):
        compare(Toy.name, "window(20, 20)", 100, "plain", SHAPES[0], FP32)


# calls that "auto" gives to others than those that have names
def whole_texts():
    """Cases of which the pattern leaves nothing out."""
    for i, (pattern, causal, length, name) in enumerate(ALL):
        text = causal_form(pattern) if causal == "causal" else pattern
        parsed = Pattern.parse(text)
        if name == "plain" and parsed.heads is None and is_causal(parsed, length, length, 0) is not None:
            dtype = (FP32, BF16, torch.float64)[length % 3]
            yield pytest.param(text, length, name, SHAPES[i % len(SHAPES)], dtype, id=f"{i}-{text[:30]}-{length}")


@pytest.mark.parametrize(("pattern", "length", "case", "shape", "dtype"), list(whole_texts()))
def test_dense_is_exact(pattern, length, case, shape, dtype):
    call = call_of(*tensors(shape, length, length, dtype), pattern, wants_lse=False)
    assert DENSE.why_not(call) is None
    compare(DENSE, pattern, length, case, shape, dtype, wants_lse=False)


def short_texts():
    """Cases that decoding takes."""
    for i, (pattern, causal, length, name) in list(enumerate(ALL))[::17]:
        if length <= 100:
            text, dtype = causal_form(pattern) if causal == "causal" else pattern, BF16 if i % 3 == 0 else FP32
            yield pytest.param(
                text, length, name, SHAPES[i % len(SHAPES)], dtype, id=f"{i}-{text[:30]}-{length}-{name}"
            )


@pytest.mark.parametrize(("pattern", "length", "case", "shape", "dtype"), list(short_texts()))
def test_decode_is_exact(pattern, length, case, shape, dtype):
    q_len, given, _ = batch_of(case, length)
    call = call_of(*tensors(shape, q_len, length, dtype), pattern, **given, wants_lse=False)
    reason = DECODE.why_not(call)
    if reason:
        pytest.skip(reason)
    compare(DECODE, pattern, length, case, shape, dtype, wants_lse=False)


def strided_cases():
    patterns = [p for p in PATTERNS if any(
        isinstance(read_stride(one, 100), StrideForm) for one in Pattern.parse(p).heads or (Pattern.parse(p),)
    )]  # fmt: skip
    for i, pattern in enumerate(patterns):
        for s, case in enumerate(SCENARIOS):
            if case != "last_queries":
                text = causal_form(pattern) if (i + s) % 2 else pattern
                length = (63, 100, 257)[(i + s) % 3]
                yield pytest.param(text, length, case, SHAPES[(i + s) % len(SHAPES)], id=f"{text[:30]}-{length}-{case}")


@pytest.mark.parametrize(("pattern", "length", "case", "shape"), list(strided_cases()))
def test_strided_is_exact(pattern, length, case, shape, monkeypatch):
    # whatever can be regrouped is, however little that spares
    monkeypatch.setattr("sparse_hf.plan.strided.MIN_GAIN", 0)
    assert isinstance(chosen("blockwise", pattern, length, case, shape), Strided)
    compare("blockwise", pattern, length, case, shape, FP32)


@pytest.mark.cross(("backend", "case"), "pattern")
@pytest.mark.parametrize(("backend", "kind"), [("blockwise", ContentPairs), ("reference", DenseContentPairs)])
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", hashes.PATTERNS)
def test_hashed_pairs_are_exact(pattern, case, backend, kind):
    shape = (4, 2, 16)
    assert type(chosen(backend, pattern, 50, case, shape)) is kind
    compare(backend, pattern, 50, case, shape, FP32, mask_of=hashes.mask_of)


def chosen(backend: str, pattern: str, length: int, case: str, shape):
    """What runs a case."""
    q_len, given, _ = batch_of(case, length)
    return route(call_of(*tensors(shape, q_len, length, FP32), pattern, **given), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", ["plain", "right_padding", "left_padding", "last_queries"])
@pytest.mark.parametrize(("pattern", "length"), [(DRAWN, 700), (BLOCKS, 2000), (causal_form(BLOCKS), 1000)])
def test_what_is_chosen_on_a_gpu_is_exact_on_bigbirds_blocks(pattern, length, case, dtype):
    compare("auto", pattern, length, case, (4, 2, 64), dtype, "cuda")


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
