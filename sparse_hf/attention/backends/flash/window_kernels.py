"""FlashAttention kernels with a window, forward and backward, behind one small interface.

A part of a merged attention is differentiated by handing its kernel the merged output and log-sum-exp: the kernels recompute
the weights as exp(score - lse), so that the gradients of the parts add up to those of the whole.

Legend: B batch, Q queries, K keys, H query heads, G key heads, D head dim; T tokens of all rows, flattened. With `packed`, tensors are
`[T, heads, D]` and lse `[H, T]`; without, `[B, length, heads, D]` and `[B, H, Q]`. The last query stands at the last key.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ...backend import Given
from ...devices import generation

logger = logging.getLogger(__name__)

# (left, right), None is no limit
Window = tuple[int | None, int | None]
EVERYTHING: Window = (None, None)
CAUSAL: Window = (None, 0)


@dataclass(frozen=True, eq=False)
class Packed:
    """Where sequences begin on the flattened axis: `[N + 1]` int32 each, and the longest of them."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def pack(q_ranges: Tensor, k_ranges: Tensor, total_q: int, total_k: int, device) -> Packed:
    """Sequences at the ranges `[S, 2]` (first, last + 1), ascending; tokens between them belong to none.

    Kernels want sequences without gaps: queries in a gap become a sequence without keys, keys in a gap one without queries.
    Output and gradient of the former are undefined; the gradients of the latter are 0.
    """
    previous = torch.nn.functional.pad(torch.stack((q_ranges[:, 1], k_ranges[:, 1]), 1), (0, 0, 1, 0))
    begins = torch.stack((q_ranges[:, 0], k_ranges[:, 0]), 1)
    ends = torch.tensor([[total_q, total_k]])
    gaps = torch.cat((begins, ends)) - previous
    lengths = torch.zeros(len(gaps), 3, 2, dtype=torch.long)
    lengths[:, 0, 0], lengths[:, 1, 1] = gaps[:, 0], gaps[:, 1]
    lengths[:-1, 2] = previous[1:] - begins
    lengths = lengths.flatten(0, 1)
    lengths = lengths[lengths.any(1)]
    cu = torch.nn.functional.pad(lengths.cumsum(0), (0, 0, 1, 0)).int()
    max_q, max_k = lengths.amax(0).tolist()
    cu_q, cu_k = (c.contiguous().to(device) for c in cu.unbind(1))
    return Packed(cu_q, cu_k, max_q, max_k)


class WindowKernels(Protocol):
    """FlashAttention with a window, forward and backward."""

    name: str

    def refuses(self, q: Tensor) -> str | None:
        """Why the kernels cannot run here, or None."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, window: Window, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Out shaped like q, and lse."""
        ...

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, given: Given, packed: Packed | None, window: Window, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...


class _FA2:
    """The FlashAttention-2 kernels that torch carries, those under `torch.nn.attention.varlen`."""

    name = "fa2"

    def refuses(self, q: Tensor) -> str | None:
        if generation(q.device) < 8:
            return f"it needs compute capability 8.0 or higher, and {torch.cuda.get_device_name(q.device)} has less"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, window: Window, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(q, k, packed), 0.0, window == CAUSAL, False, scale=scale, **_sides(window)
        )
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, given: Given, packed: Packed | None, window: Window, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        how, grad_lse = (packed, window, scale), given.grad_lse
        grads = self._backward(q, k, v, given, *how)
        if grad_lse is None:
            return grads
        # these kernels know no gradient of lse. d score = weight * (grad_out @ v - sum(grad_out * out)), so that v = 0 and a
        # product sum(grad_out * out) of -grad_lse leave weight * grad_lse; three halves hold a float32 number
        fake_out, ones = torch.zeros_like(given.out), torch.zeros_like(given.out)
        rest = -(grad_lse.transpose(-1, -2)).float()
        for column in range(3):
            fake_out[..., column] = rest.to(fake_out.dtype)
            rest = rest - fake_out[..., column].float()
        ones[..., :3] = 1
        more = self._backward(q, k, torch.zeros_like(v), Given(fake_out, given.lse, ones, None), *how)
        return grads[0].add_(more[0]), grads[1].add_(more[1]), grads[2]

    @staticmethod
    def _backward(
        q: Tensor, k: Tensor, v: Tensor, given: Given, packed: Packed | None, window: Window, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # random state of a dropout that there is none of
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        rest = (*_lengths(q, k, packed), 0.0, window == CAUSAL, state, unused)
        return torch.ops.aten._flash_attention_backward(
            given.grad_out, q, k, v, given.out, given.lse, *rest, scale=scale, **_sides(window)
        )


def _lengths(q: Tensor, k: Tensor, packed: Packed | None) -> tuple:
    if packed is None:
        return None, None, q.shape[1], k.shape[1]
    # one query per sequence would take a path for decoding, which expects a query in every sequence
    return packed.cu_q, packed.cu_k, max(2, packed.max_q), packed.max_k


def _sides(window: Window) -> dict[str, int]:
    left, right = (-1 if side is None else side for side in window)
    return {"window_size_left": left, "window_size_right": right}


# seen with 4.0.0b36 on an H200: of heads of 16 and 80 numbers outputs are right and gradients are not, of 32, 64 and 128 both are
FA4_WIDTH = 32


class _FA4:
    """FlashAttention-4, the CuTe kernels of the package `flash-attn-4`."""

    name = "fa4"

    def refuses(self, q: Tensor) -> str | None:
        broken = _fa4_broken()
        if broken:
            return broken
        major = generation(q.device)
        if major not in (9, 10) or (major == 10 and q.shape[-1] > 128):
            return f"flash-attn-4 has no backward for head dim {q.shape[-1]} on {torch.cuda.get_device_name(q.device)}"
        if q.shape[-1] % FA4_WIDTH:
            return f"gradients of flash-attn-4 are wrong where the head dim, here {q.shape[-1]}, is no multiple of {FA4_WIDTH}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, window: Window, scale: float
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

        quiet_fa4()
        return _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **_fa4_arguments(packed, window))[:2]

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, given: Given, packed: Packed | None, window: Window, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

        quiet_fa4()
        return _flash_attn_bwd(
            q, k, v, given.out, given.grad_out, given.lse, softmax_scale=scale, dlse=given.grad_lse,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_fa4_arguments(packed, window),
        )  # fmt: skip


FA2: WindowKernels = _FA2()
FA4: WindowKernels = _FA4()


# what the compiler of flash-attn-4 4.0.0b36 says of every kernel: an argument of flash-attn-4's own is none that it knows
_SAID_OF_KERNELS = (
    "ignore",
    re.compile(
        r"Argument aux_data \(position \d+\) cannot be converted to a JitArgument for function .*flash_attn", re.I
    ),
    UserWarning,
    re.compile(r"cutlass\.base_dsl\.dsl"),
    0,
)


def quiet_fa4() -> None:
    """Leave out that warning, which is nothing to who calls us, and no other."""
    # not `catch_warnings`: threads would put back each other's filters
    if _SAID_OF_KERNELS not in warnings.filters:
        action, message, category, module, _ = _SAID_OF_KERNELS
        warnings.filterwarnings(action, message.pattern, category, module.pattern)


def _fa4_arguments(packed: Packed | None, window: Window) -> dict:
    given = {"window_size_left": window[0], "window_size_right": window[1]}
    if packed is not None:
        given |= {"cu_seqlens_q": packed.cu_q, "cu_seqlens_k": packed.cu_k}
        given |= {"max_seqlen_q": packed.max_q, "max_seqlen_k": packed.max_k}
    return given


@lru_cache(maxsize=1)
def _fa4_broken() -> str | None:
    """Why flash-attn-4 cannot be used; said once if it is installed."""
    try:
        if importlib.util.find_spec("flash_attn.cute") is None:
            return "flash-attn-4 is not installed"
    except ModuleNotFoundError:
        return "flash-attn-4 is not installed"
    version = importlib.metadata.version("flash-attn-4")
    try:
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_bwd,
            _flash_attn_fwd,
        )
    except ImportError as error:
        reason = f"flash-attn-4 {version} is installed and does not import: {error}"
        logger.warning("%s; windows run on torch's FlashAttention-2", reason)
        return reason
    # a merged backward needs the functions below the public ones
    both = {"window_size_left", "block_sparse_tensors", "mask_mod", "aux_tensors"}
    wanted = {
        _flash_attn_fwd: {"return_lse", "pack_gqa"} | both,
        _flash_attn_bwd: {"dlse", "deterministic", "lse"} | both,
    }
    missing = {n for function, names in wanted.items() for n in names - set(inspect.signature(function).parameters)}
    if missing:
        reason = f"flash-attn-4 {version} has no argument {', '.join(sorted(missing))}; 4.0.0b16 has"
        logger.warning("%s; windows run on torch's FlashAttention-2", reason)
        return reason
    return None


KERNELS: dict[str, WindowKernels] = {"fa4": FA4, "fa2": FA2}
# not a context variable: the backward pass runs on threads of its own
_only: list[str] = []


@contextmanager
def only(name: str) -> Iterator[None]:
    """Run on these kernels and no others, for benchmarks and tests."""
    _only.append(name)
    try:
        yield
    finally:
        _only.pop()


def forced_kernels() -> str | None:
    """The kernels that `only` names, within it."""
    return _only[-1] if _only else None


def kernels(q: Tensor) -> WindowKernels:
    """The fastest kernels that run here."""
    if _only:
        kind = KERNELS[_only[-1]]
        reason = kind.refuses(q)
        if reason:
            raise NotImplementedError(f"kernels {kind.name!r} cannot run here: {reason}")
        return kind
    return _fastest(q.device, q.shape[-1])


@lru_cache
def _fastest(device: torch.device, head_dim: int) -> WindowKernels:
    q = torch.empty(0, head_dim, device=device)
    found = next((kind for kind in KERNELS.values() if kind.refuses(q) is None), FA2)
    logger.info("windows of head dim %d run on the kernels %r", head_dim, found.name)
    return found
