"""What attention of ours is timed beside, and ours on each of its kernels: one table of names.

Legend: q `[1, H, n, D]`, k and v `[1, G, n, D]`, out like q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import BACKENDS, sparse_attention
from ..attention.backends.flash import backend as fa
from ..attention.backends.flash import window_kernels as flash
from ..attention.scoring import Scoring
from ..pattern import Pattern, Window, causal, full
from ..pattern.forms import read_window
from ..plan import BlockPlan, build_plan

# torch looks at all pairs to make a mask for FlexAttention
LONGEST_FLEX = 16384

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """`call` computes attention over the pairs of `pattern`, which for a peer may be others than those asked for."""

    name: str
    pattern: Pattern
    call: Attention
    # "ours", "blocks" (whole blocks around the pairs asked for), "window" (the window alone) or "dense"
    kind: str
    has_backward: bool = True


def peers(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, backends: list[str] | None) -> Iterator[Peer]:
    """Those that can run this call here; dense ones first."""
    n = q.shape[2]
    far = torch.tensor([0, n - 1])
    is_causal = n > 1 and not bool(pattern.allows(far[:1], far[:1] + 1).any())
    gqa = q.shape[1] != k.shape[1]
    dense = causal() if is_causal else full()
    for name, kernel in _dense_kernels(q.device):

        def call(q, k, v, kernel=kernel):
            from torch.nn.attention import sdpa_kernel

            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=gqa)

        yield Peer(name, dense, call, "dense")
    shape = read_window(pattern, n)
    window = None if isinstance(shape, str) else shape.window
    if window is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        yield from _window_kernels(q, window)
    if window is not None and q.device.type == "cpu" and n <= LONGEST_FLEX and _has_compiler():
        yield _flex_on_cpu(window, n, gqa)
    yield from _ours(pattern, q, v, backends)


def _dense_kernels(device: torch.device):
    if device.type != "cuda":
        return [("sdpa_dense", None)]
    from torch.nn.attention import SDPBackend

    return [("sdpa_flash", SDPBackend.FLASH_ATTENTION), ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)]


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

    sides = tuple(-1 if side is None else side for side in (window.left, window.right))
    gqa = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__annotations__ else {}

    def varlen(q, k, v):
        n = q.shape[2]
        cu = torch.tensor([0, n], dtype=torch.int32, device=q.device)
        flat = (t[0].transpose(0, 1) for t in (q, k, v))
        return varlen_attn(*flat, cu, cu, n, n, window_size=sides, **gqa).transpose(0, 1)[None]

    yield Peer("varlen_fa2", window, varlen, "window")
    if flash.FA4.refuses(q) is None:
        from flash_attn.cute import flash_attn_func

        def fa4(q, k, v):
            heads_last = (t.transpose(1, 2) for t in (q, k, v))
            return flash_attn_func(*heads_last, window_size=(window.left, window.right))[0].transpose(1, 2)

        yield Peer("flash_attn_4", window, fa4, "window")


def _ours(pattern: Pattern, q: Tensor, v: Tensor, backends: list[str] | None) -> Iterator[Peer]:
    plan = build_plan(pattern, q.shape[2], device=q.device)
    scoring = Scoring(q.shape[-1] ** -0.5)
    for name in backends or [name for name in BACKENDS if name != "reference"]:
        if BACKENDS[name].refuses(q, v, plan, scoring, 0.0) is not None and not backends:
            continue
        if not backends and name == "blockwise" and q.is_cuda:
            continue
        for kind in _kinds(q, v, plan, scoring) if name == "fa" else [None]:

            def call(q, k, v, name=name, kind=kind):
                with nullcontext() if kind is None else flash.only(kind.name):
                    return sparse_attention(q, k, v, pattern, backend=name)

            yield Peer(name if kind is None else f"{name} ({kind.name})", pattern, call, "ours")


def _kinds(q: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring) -> list:
    """The kernels with which `fa` can run this call; None, which says why it cannot, if there are none."""
    able = []
    for kind in flash.KERNELS.values():
        if kind.refuses(q) is None:
            with flash.only(kind.name):
                able += [kind] if fa.refuses(q, v, plan, scoring, 0.0) is None else []
    return able or [None]
