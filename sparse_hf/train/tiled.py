"""Feed-forward layers that go through a text piece by piece.

They treat each token alone, and what they keep of one is several times its hidden state. Pieces are
computed again in the backward pass, so that only one of them keeps it at a time.

Legend: T tokens, D hidden size, ... any leading dimensions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .first_order import first_order

logger = logging.get_logger(__name__)
# classes of feed-forward layers
NAMES = re.compile(r"(MLP|Mlp|FeedForward|FFN|FF|ActDense)$")
# methods of layers that are the feed-forward layer, for apply_chunking_to_forward
METHODS = ("feed_forward_chunk", "ff_chunk")
# norms that go by way of float32 keep several times their input. They are quick, and what they keep
# matters only in texts of more pieces than this
NORMS_FROM_PIECES = 8


@dataclass
class Pieces:
    """How one call goes piece by piece, and what has to be the same when it is done again.

    Attributes:
        function: `[..., T, D]` to `[..., T, D]`, each token alone.
        size: tokens of a piece.
    """

    function: Callable[[Tensor], Tensor]
    size: int
    device: torch.device
    autocast: tuple[torch.dtype, bool] = field(init=False)
    random_states: tuple[Tensor, list[int], list[Tensor]] = field(init=False)

    def __post_init__(self):
        kind = self.device.type
        self.autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # dropout draws the same again
        self.random_states = torch.get_rng_state(), *get_device_states(torch.empty(0, device=self.device))

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """`[..., D]` to pieces `[1, T, D]`, or `[T, D]` of what has no rows."""
        pieces = x.reshape(-1, x.shape[-1]).split(self.size)
        return pieces if x.dim() == 2 else [piece[None] for piece in pieces]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Draws of the first time, and its autocast."""
        dtype, enabled = self.autocast
        state, devices, states = self.random_states
        with torch.random.fork_rng(devices), torch.autocast(self.device.type, dtype, enabled, cache_enabled=False):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            yield


class _Remember(torch.autograd.Function):
    """Hands on its input, and turns the gradient of the output of `_Compute` into those of input and weights.

    What is kept is kept before anything is computed. A layer that is checkpointed stops here when
    it is computed again, and does not go through the pieces once more than needed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, pieces: Pieces, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.pieces, ctx.weights = pieces, weights
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(ctx.weights)
        parts = [ctx.pieces.split(t) for t in (x, grad)]
        start = 0
        with ctx.pieces.as_before():
            for piece, grad_piece in zip(*parts, strict=True):
                leaf = piece.detach().requires_grad_(ctx.needs_input_grad[0])
                with torch.enable_grad():
                    out = ctx.pieces.function(leaf)
                wanted = [*([leaf] if leaf.requires_grad else []), *ctx.weights]
                found = list(torch.autograd.grad(out, wanted, grad_piece.to(out.dtype), allow_unused=True))
                if grad_x is not None:
                    rows = grad_x.view(-1, x.shape[-1])[start : start + piece.shape[-2]]
                    rows.copy_(found.pop(0).view_as(rows))
                    start += len(rows)
                sums = [_added(*both) for both in zip(sums, found, strict=True)]
        grads = (None if s is None else s.to(w.dtype) for s, w in zip(sums, ctx.weights, strict=True))
        return grad_x, None, *grads


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """A sum of gradients of pieces, kept in float32 at least, as a matrix product keeps it."""
    if grad is None:
        return total
    return grad.to(torch.promote_types(grad.dtype, torch.float32)) if total is None else total.add_(grad)


class _Compute(torch.autograd.Function):
    """Computes the output piece by piece; its gradient is `_Remember`'s to make use of."""

    @staticmethod
    def forward(ctx, x: Tensor, pieces: Pieces) -> Tensor:
        return compute(x, pieces)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def compute(x: Tensor, pieces: Pieces) -> Tensor:
    """The output, of x's shape; the autograd graph is not recorded."""
    out, start = None, 0
    with torch.no_grad():
        for piece in pieces.split(x):
            made = pieces.function(piece)
            if not isinstance(made, Tensor) or made.shape != piece.shape:
                raise ValueError(
                    f"{pieces.function} does not give one tensor of its input's shape; call long_text with feed_forward=None"
                )
            if out is None:
                out = torch.empty(x.shape, dtype=made.dtype, device=x.device)
            rows = out.view(-1, x.shape[-1])[start : start + made.shape[-2]]
            rows.copy_(made.view_as(rows))
            start += len(rows)
    assert out is not None
    return out


def tiled(owner: nn.Module, function: Callable, size: int, x: Tensor) -> Tensor:
    """What `function(x)` gives, a method of `owner`, piece by piece where `x` has more than `size` tokens."""
    if x.numel() <= size * x.shape[-1] or is_compiled():
        return function(x)
    weights = [p for p in owner.parameters() if p.requires_grad]
    refuse_partitioned(weights)
    pieces = Pieces(function, size, x.device)
    if not torch.is_grad_enabled() or not (x.requires_grad or weights):
        return compute(x, pieces)
    result = _Compute.apply(_Remember.apply(x, pieces, *weights), pieces)
    assert isinstance(result, Tensor)
    return result


def tiled_forward(owner: nn.Module, function: Callable, size: int, *args: Any, **kwargs: Any) -> Any:
    """`tiled`, for a `forward` that may be given more than hidden states."""
    if len(args) != 1 or kwargs:
        return function(*args, **kwargs)
    return tiled(owner, function, size, *args)


def tiled_norm(owner: nn.Module, function: Callable, size: int, *args: Any, **kwargs: Any) -> Any:
    """`tiled_forward`, in long texts alone."""
    is_long = args and args[0].numel() > NORMS_FROM_PIECES * size * args[0].shape[-1]
    return tiled_forward(owner, function, size, *args, **kwargs) if is_long else function(*args, **kwargs)


def is_compiled() -> bool:
    """Is this code traced by torch.compile, which takes a module as it was?"""
    return torch.compiler.is_compiling() and _say_compiled()


# called where code is traced, and no part of what is compiled
@torch.compiler.assume_constant_result
def _say_compiled() -> bool:
    logger.warning_once("torch.compile computes whole what long_text computes in pieces; leave one of them out")
    return True


def refuse_partitioned(weights: Iterable[Tensor]) -> None:
    if any(hasattr(w, "ds_id") for w in weights):
        raise ValueError(
            "DeepSpeed's ZeRO-3 takes weights apart again while long_text still needs them; use FSDP2, or no long_text"
        )


def is_per_token(module: nn.Module) -> bool:
    """Is it made of what treats each token alone, and called with hidden states alone?"""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    leaves = [leaf for leaf in module.modules() if next(leaf.children(), None) is None]
    return len(needed) == 1 and all(map(_is_leaf_per_token, leaves))


def _is_leaf_per_token(leaf: nn.Module) -> bool:
    if isinstance(leaf, (nn.Linear, Conv1D)) or type(leaf).__name__.endswith("Norm"):
        return True
    is_function = type(leaf).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    known = (nn.Dropout, nn.Identity, nn.ModuleDict, nn.ModuleList, nn.ParameterDict)
    return next(leaf.parameters(), None) is None and (is_function or isinstance(leaf, known))


def find_feed_forward(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Feed-forward layers by name: the module, and its method that treats each token alone."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if NAMES.search(type(module).__name__):
            if is_per_token(module):
                found[name] = module, "forward"
            continue
        for method in METHODS:
            if hasattr(type(module), method):
                found[name] = module, method
    return found


def find_norms(model: nn.Module, width: int) -> dict[str, nn.Module]:
    """Norms of hidden states of `width` that are written in Python; torch's own keep their input alone."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        and not isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        and [tuple(p.shape) for p in module.parameters()] == [(width,)]
    }
