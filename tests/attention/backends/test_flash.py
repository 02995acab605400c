"""`fa`: the merge and its gradients in float64 on plain kernels; on a GPU exactness, determinism and odd inputs.

On a GPU it runs on the kernels of torch and, if it is installed, of flash-attn-4.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention import attend
from sparse_hf.attention.backends.flash import window_kernels as flash
from sparse_hf.attention.backends.sdpa.decode import MAX_QUERIES
from sparse_hf.attention.dispatch import BACKENDS
from sparse_hf.plan import split
from tests import oracle
from tests.attention.exactness import call_of, compare, tensors
from tests.attention.plain_kernels import Plain
from tests.plan.test_window_tables import PATTERNS, plan_of
from tests.table import LENGTHS, SCENARIOS, SHAPES, causal_form


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(flash, "kernels", lambda q: Plain)


@pytest.mark.cross
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_merge_and_its_gradients_are_exact(pattern, case, plain):
    index = PATTERNS.index(pattern) + SCENARIOS.index(case)
    for step, text in enumerate((pattern, causal_form(pattern))):
        length = LENGTHS[(index + step) % 4]
        plan, q_len, data = plan_of(text, length, case)
        if isinstance(split(plan, 2), str):
            continue
        generator = torch.Generator().manual_seed(index)
        q, k, v = (
            torch.randn(2, h, n, 8, generator=generator, dtype=torch.float64)
            for h, n in ((4, q_len), (2, length), (2, length))
        )
        mask = oracle.dense_mask(text, q_len, length, **data)
        exact = oracle.gradients(lambda *t, m=mask: oracle.attention(*t, m), q, k, v)
        ours = oracle.gradients(lambda *t, p=plan: attend(call_of(*t, p), BACKENDS["fa"]), q, k, v)
        for got, wanted in zip(ours, exact, strict=True):
            torch.testing.assert_close(got, wanted)


def test_the_gradient_of_the_output_alone_is_exact(plain):
    q, k, v = (torch.randn(1, 2, 50, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    plan = build_plan("window(5, 5) | first(2)", 50)
    mask = oracle.dense_mask("window(5, 5) | first(2)", 50, 50)
    ours = torch.autograd.grad(attend(call_of(q, k, v, plan), BACKENDS["fa"])[0].square().sum(), (q, k, v))
    exact = torch.autograd.grad(oracle.attention(q, k, v, mask)[0].square().sum(), (q, k, v))
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "it needs a GPU and q is on cpu"),
        ({"dropout": 0.5}, "use backend='blockwise'"),
        ({"softcap": 5.0}, "without soft cap or relative bias; use backend='flex'"),
        ({"relative_bias": torch.zeros(2, 39)}, "without soft cap or relative bias"),
    ],
)
def test_what_it_cannot_run_is_refused_with_a_reason(change, message):
    q = torch.zeros(1, 2, 20, 8)
    with pytest.raises(NotImplementedError, match=message):
        sparse_attention(q, q, q, "window(3, 0)", backend="fa", **change)


SAID = "Argument aux_data (position 17) cannot be converted to a JitArgument for function 'cutlass___call___{}'. Its type is not supported."


def test_one_warning_of_a_compiler_is_left_out_and_no_other():
    """By its source and its text; the first is what flash-attn-4 4.0.0b36 has said of each kernel."""
    others = [
        (SAID.format("flash_attncuteflash_fwd_sm90"), UserWarning, "somebody.else"),
        (SAID.format("kernels_of_others"), UserWarning, "cutlass.base_dsl.dsl"),
        (SAID.format("flash_attncuteflash_fwd_sm90").replace("aux_data", "q"), UserWarning, "cutlass.base_dsl.dsl"),
        (SAID.format("flash_attncuteflash_fwd_sm90"), RuntimeWarning, "cutlass.base_dsl.dsl"),
    ]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = len(warnings.filters)
        flash.quiet_fa4()
        flash.quiet_fa4()
        assert len(warnings.filters) == before + 1
        warnings.warn_explicit(
            SAID.format("flash_attncuteflash_fwd_sm90"), UserWarning, "dsl.py", 1, "cutlass.base_dsl.dsl"
        )
        assert not heard
        for text, category, module in others:
            warnings.warn_explicit(text, category, "dsl.py", 1, module)
        assert [(str(w.message), w.category) for w in heard] == [(text, category) for text, category, _ in others]


# flash-attn-4 compiles a kernel per head dim, head ratio, kind of window and packing: fewer of them
FA4_PATTERNS = ["window(20, 20)", "window(40, 0)", "window(16, 16) | first(2)", "streaming(window=32, sinks=4)"]


def gpu_cases(patterns, shapes):
    found = []
    for p, pattern in enumerate(patterns):
        for s, case in enumerate(SCENARIOS):
            for c, text in enumerate(dict.fromkeys((pattern, causal_form(pattern)))):
                if isinstance(split(build_plan(text, 1000, marks=torch.ones(1, 1000)), 1), str):
                    continue
                shape, length = shapes[(p + s + c) % len(shapes)], LENGTHS[(p + s + 2 * c) % len(LENGTHS)]
                found.append(pytest.param(text, length, case, shape, id=f"{text[:30]}-{length}-{case}-{shape}"))
    return found


def poison() -> None:
    """Leave NaN in memory that is about to be handed out, so that what a kernel does not write shows."""
    torch.cuda.empty_cache()
    del [torch.full((size,), torch.nan, device="cuda") for size in (1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 24)][:]


def run(kernels: str, *args, **kwargs) -> None:
    reason = flash.KERNELS[kernels].refuses(torch.empty(1, 64, device="cuda"))
    if reason:
        pytest.skip(reason)
    poison()
    with flash.only(kernels):
        compare("fa", *args, device="cuda", **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), gpu_cases(PATTERNS, SHAPES))
def test_fa_is_exact_on_torchs_kernels(pattern, length, case, shape):
    run("fa2", pattern, length, case, shape, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "length", "case", "shape"), gpu_cases(FA4_PATTERNS, [(4, 2, 64), (4, 4, 128)]))
def test_fa_is_exact_on_flash_attn_4(pattern, length, case, shape):
    run("fa4", pattern, length, case, shape, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("pattern", ["window(40, 0) | first(4) & window(None, 0)", "window(30, 5) | marked()"])
def test_fa_is_exact_in_float16_at_every_head_dim(pattern, head_dim):
    run("fa2", pattern, 257, "packed", (4, 2, head_dim), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 48, 80, 96, 112])
def test_fa_is_exact_at_every_head_dim_on_whatever_kernels_it_takes(head_dim):
    poison()
    compare(
        "fa",
        "window(40, 0) | first(4) & window(None, 0)",
        500,
        "packed",
        (4, 2, head_dim),
        torch.bfloat16,
        device="cuda",
    )


@pytest.mark.parametrize(
    ("head_dim", "is_taken"), [(8, False), (16, False), (32, True), (80, False), (96, True), (128, True)]
)
def test_flash_attn_4_is_left_where_its_gradients_are_wrong(head_dim, is_taken, monkeypatch):
    monkeypatch.setattr(flash, "_fa4_broken", lambda: None)
    monkeypatch.setattr(flash, "generation", lambda device: 9)
    reason = flash.FA4.refuses(torch.empty(0, head_dim))
    assert reason is None if is_taken else "no multiple of 32" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["fa2", "fa4"])
def test_expanded_and_interleaved_tensors_are_read_right(kernels):
    reason = flash.KERNELS[kernels].refuses(torch.empty(1, 64, device="cuda"))
    if reason:
        pytest.skip(reason)
    q, k, v = tensors((4, 2, 64), 257, 257, torch.bfloat16, "cuda")
    pattern = "window(20, 0) | first(4) & window(None, 0)"

    def gradients(q, k, v):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        # the gradient of a sum is one number, expanded
        return torch.autograd.grad(sparse_attention(*leaves, pattern, backend="fa").sum(), leaves)

    # as models make them: heads after tokens, and all three in one tensor
    with flash.only(kernels):
        wanted = gradients(q, k, v)
        as_views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        joined = torch.cat((q, k, v), 1).transpose(1, 2).contiguous().transpose(1, 2).split((4, 2, 2), 1)
        for given in (as_views, joined):
            for got, right in zip(gradients(*given), wanted, strict=True):
                torch.testing.assert_close(got, right, atol=2e-2, rtol=2e-2)


def repeated(kernels: str, pattern: str):
    q, k, v = tensors((4, 2, 64), 1000, 1000, torch.bfloat16, "cuda")
    with flash.only(kernels):
        return [
            oracle.gradients(lambda *t: sparse_attention(*t, pattern, backend="fa", return_lse=True), q, k, v)
            for _ in range(20)
        ]


# torch warns whenever determinism is asked for with a warning rather than an error
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Flash Attention defaults to a non-deterministic algorithm")
@pytest.mark.parametrize("kernels", ["fa2", "fa4"])
@pytest.mark.parametrize("pattern", ["window(100, 0) | first(4) & window(None, 0)", "window(64, 64) | first(2)"])
def test_twenty_runs_are_bitwise_equal_if_torch_is_told_so(kernels, pattern):
    reason = flash.KERNELS[kernels].refuses(torch.empty(1, 64, device="cuda"))
    if reason:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = repeated(kernels, pattern)
    finally:
        torch.use_deterministic_algorithms(False)
    for later in runs[1:]:
        for one, other in zip(runs[0], later, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["fa2", "fa4"])
def test_twenty_runs_differ_by_roundings_at_most(kernels):
    # gradients of queries are added up in no fixed order; outputs and lse are the same each time
    reason = flash.KERNELS[kernels].refuses(torch.empty(1, 64, device="cuda"))
    if reason:
        pytest.skip(reason)
    runs = repeated(kernels, "window(64, 64) | first(2)")
    for later in runs[1:]:
        for one, other in zip(runs[0][:2], later[:2], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(runs[0][2:], later[2:], strict=True):
            assert (one.float() - other.float()).abs().max() <= 2**-7 * one.float().abs().max()


@pytest.mark.gpu
def test_what_has_no_gradient_of_lse_costs_no_second_pass(monkeypatch):
    calls = []
    original = flash.FA2._backward
    monkeypatch.setattr(flash.FA2, "_backward", lambda *a: calls.append(1) or original(*a))
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 64), 257, 257, torch.bfloat16, "cuda"))
    with flash.only("fa2"):
        sparse_attention(q, k, v, "window(20, 0)", backend="fa").sum().backward()
        assert len(calls) == 1
        step = torch.compile(lambda q, k, v: sparse_attention(q, k, v, "window(20, 0)", backend="fa").sum())
        step(q, k, v).backward()
        assert len(calls) == 2


# torch records an empty graph to begin with, and warns of it
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("length", [640, 100])
@pytest.mark.parametrize("pattern", ["window(64, 64) | first(2)", "chunk(64, 1, 1) | first(64) | last(1, 64)"])
def test_recorded_in_a_cuda_graph_it_stays_exact(pattern, length):
    def loss(q, k, v):
        return sparse_attention(q, k, v, pattern).float().square().sum()

    skipped = torch._dynamo.utils.counters["inductor"]
    before = skipped["cudagraph_skips"]
    torch._dynamo.reset()
    step = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for trial in range(6):
        q, k, v = (t.detach() for t in tensors((4, 4, 64), length, length, torch.bfloat16, "cuda"))
        leaves = [(t * (1 + trial / 4)).requires_grad_() for t in (q, k, v)]
        right = torch.autograd.grad(loss(*leaves), leaves)
        torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(step(*leaves), leaves)
        for one, other in zip(got, right, strict=True):
            if length < MAX_QUERIES:
                # both are of different backends, so that single numbers may be roundings apart
                assert (one - other).float().norm() <= 3e-2 * other.float().norm()
            else:
                torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
        # plans of other lengths push this one out of every cache
        for n in range(length // 5, length // 5 + 70) if trial == 4 else ():
            build_plan(pattern, n, device="cuda")
            sparse_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], "window(5, 5)", backend="fa")
            poison()
    assert skipped["cudagraph_skips"] == before
