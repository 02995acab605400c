"""Attention that ours is timed beside, and ours on each of its kernels.

Legend: q `[1, H, n, D]`, k `[1, G, n, D]`, v `[1, G, n, E]`, out `[1, H, n, E]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import BACKENDS, attend, route, sparse_attention
from ..attention.api import BackendName
from ..attention.backend import AttentionCall
from ..attention.backends.flash.window_kernels import FA4, KERNELS, only
from ..attention.dispatch import content_plan
from ..pattern import Pattern, Window, causal, full
from ..pattern.forms import read_content, read_window
from ..plan.lsh import leaves_out_future as is_cut
from .exactness import plain_call

# torch evaluates all pairs to make a mask for FlexAttention
MAX_FLEX_TOKENS = 16384

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One row of the benchmark.

    Attributes:
        pattern: the pairs that `call` computes, which may be others than those asked for.
        kind: "ours", "blocks" (whole blocks around the pairs asked for), "window" (the window
            alone) or "dense".
        context: what the call and its backward pass run under.
        chosen_by: of keys, those by which the call chooses its pairs.
    """

    name: str
    pattern: Pattern
    call: Attention
    kind: Literal["ours", "blocks", "window", "dense"]
    has_backward: bool = True
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    chosen_by: Callable[[Tensor], Tensor] = lambda k: k


def peers(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, backends: list[str] | None) -> Iterator[Peer]:
    """Those that can run this call here; dense ones first."""
    n = q.shape[2]
    is_causal = n > 1 and leaves_out_future(pattern)
    gqa = q.shape[1] != k.shape[1]
    dense = causal() if is_causal else full()

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=gqa)

    def sdpa_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # what Transformers does for kernels of one head dim
        return sdpa(q, k, torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1])))[..., : v.shape[-1]]

    for name, context in _dense_kernels(q.device).items():
        yield Peer(name, dense, sdpa, "dense", context=context)
    one_width = q.shape[-1] == v.shape[-1]
    if q.is_cuda and not one_width:
        yield Peer("sdpa_efficient", dense, sdpa, "dense", context=partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION))
        if v.shape[-1] < q.shape[-1]:
            flash = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
            yield Peer("sdpa_flash_padded", dense, sdpa_padded, "dense", context=flash)
    if pattern.uses_content:
        if q.is_cuda and FA4.refuses(q) is None:
            yield Peer("flash_attn_4_dense", dense, _fa4((None, 0 if is_causal else None)), "dense")
        yield from _choosing(pattern, q, k, v, backends)
        return
    form = read_window(pattern, n)
    window = None if isinstance(form, str) else form.window
    if window is not None and one_width and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        yield from _window_kernels(q, window)
    if window is not None and q.device.type == "cpu" and n <= MAX_FLEX_TOKENS and _has_compiler():
        yield _flex_on_cpu(window, n, gqa)
    yield from _ours(pattern, q, k, v, backends)


def leaves_out_future(pattern: Pattern) -> bool:
    """Does a pattern hold no pair of a query and a later key?"""
    if pattern.uses_content:
        form = read_content(pattern)
        return all(is_cut(cut) for _, cut in form.chosen) and leaves_out_future(form.positions)
    token = torch.tensor([0])
    return not bool(pattern.allows(token, token + 1).any())


def _choosing(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, backends: list[str] | None) -> Iterator[Peer]:
    """Ours with the choice, and attention alone over a choice that was made before."""
    for name in backends or ["auto"]:
        yield Peer(name, pattern, partial(_run, pattern, cast(BackendName, name)), "ours")
    with torch.no_grad():
        plan = content_plan(plain_call(q, k, v, pattern))

    def attend_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = plain_call(q, k, v, pattern)
        call.chosen_plan = plan
        return attend(call, route(call, "auto"))[0]

    yield Peer("auto, keys given", pattern, attend_alone, "ours")


def _dense_kernels(device: torch.device) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    if device.type != "cuda":
        return {"sdpa_dense": nullcontext}
    kernels = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: partial(sdpa_kernel, kernel) for name, kernel in kernels.items()}


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _flex_on_cpu(window: Window, n: int, gqa: bool) -> Peer:
    """FlexAttention as torch has it for CPUs, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    left, right = (n if side is None else side for side in (window.left, window.right))

    def holds(b, h, q, k):
        return (k >= q - left) & (k <= q + right)

    mask = create_block_mask(holds, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q, k, v):
        return compiled(*(t.detach() for t in (q, k, v)), block_mask=mask, enable_gqa=gqa)

    return Peer("flex_attention", window, call, "window", has_backward=False)


def _window_kernels(q: Tensor, window: Window) -> Iterator[Peer]:
    from torch.nn.attention.varlen import varlen_attn

    sides = (-1 if window.left is None else window.left, -1 if window.right is None else window.right)
    gqa: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__annotations__ else {}

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        cu = torch.tensor([0, n], dtype=torch.int32, device=q.device)
        flat_q, flat_k, flat_v = (t[0].transpose(0, 1) for t in (q, k, v))
        out = varlen_attn(flat_q, flat_k, flat_v, cu, cu, n, n, window_size=sides, **gqa)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None]

    yield Peer("varlen_fa2", window, varlen, "window")
    if FA4.refuses(q) is None:
        yield Peer("flash_attn_4", window, _fa4((window.left, window.right)), "window")


def _fa4(sides: tuple[int | None, int | None]) -> Attention:
    """flash-attn-4's window; without a left side and with 0 on the right it is causal attention."""
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]  # an extra

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens_first = (t.transpose(1, 2) for t in (q, k, v))
        how = {"causal": True} if sides == (None, 0) else {"window_size": sides}
        return flash_attn_func(*tokens_first, **how)[0].transpose(1, 2)

    return call


def _ours(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, backends: list[str] | None) -> Iterator[Peer]:
    """Ours on the backends that were asked for, each on all of its kernels.

    By default on all that can run the call.
    """
    call = plain_call(q, k, v, pattern)
    for name in backends or [name for name in BACKENDS if name != "reference"]:
        if not backends and (BACKENDS[name].why_not(call) is not None or (name == "blockwise" and q.is_cuda)):
            continue
        run = partial(_run, pattern, cast(BackendName, name))
        kernels = _kernels(call) if name == "fa" else []
        if not kernels:
            # of a backend that was asked for, the call says why it cannot
            yield Peer(name, pattern, run, "ours")
        for kind in kernels:
            yield Peer(f"{name} ({kind})", pattern, run, "ours", context=partial(only, kind))


def _run(pattern: Pattern, backend: BackendName, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = sparse_attention(q, k, v, pattern, backend=backend)
    assert isinstance(out, Tensor)
    return out


def _kernels(call: AttentionCall) -> list[str]:
    """The kernels with which `fa` can run a call."""
    able = []
    for name, kernels in KERNELS.items():
        if kernels.refuses(call.q) is None:
            with only(name):
                able += [name] if BACKENDS["fa"].why_not(call) is None else []
    return able
