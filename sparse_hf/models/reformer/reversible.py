"""Reformer's reversible layers (arXiv:2001.04451, section 3): activations are computed again from outputs, not kept.

A layer takes two streams of states, X1 and X2: Y1 = X1 + attention(X2), Y2 = X2 + feed_forward(Y1). So X2 = Y2 -
feed_forward(Y1) and X1 = Y1 - attention(X2), and a backward pass needs nothing but the last outputs, and of each layer the
buckets and the state of the random generator.

Legend: B batch, N tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.reformer.modeling_reformer import (
    ChunkReformerFeedForward,
    ReformerAttention,
    ReformerEncoder,
    ReformerLayer,
    ReformerOnlyLMHead,
)

from ...attention.autograd import refuse_second_derivative
from ...attention.devices import is_autocast
from ..hf.processes import owes_gradients
from .attention import SparseReformerCache, Text

OWN_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SparseReformerAttention(ReformerAttention):
    """Layer norm, attention, projection; the attention inside sees its pattern."""

    def forward(self, hidden_states: Tensor, text: Text, **given) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The change of the other stream `[B, N, E]`, the weights if asked for, and the buckets of a hashed layer."""
        out, weights, buckets = self.self_attention(self.layer_norm(hidden_states), text=text, **given)
        return self.output(out), weights, buckets


class SparseChunkReformerFeedForward(ChunkReformerFeedForward):
    """The feed-forward, `chunk_size_feed_forward` tokens at a time; the last ones may be fewer."""

    def forward(self, attention_output: Tensor) -> Tensor:
        return _join([self.forward_chunk(chunk) for chunk in self.chunks(attention_output)])

    def chunks(self, states: Tensor) -> tuple[Tensor, ...]:
        return _split(states, self.chunk_size_feed_forward)


class SparseReformerOnlyLMHead(ReformerOnlyLMHead):
    """The head, `chunk_size_lm_head` tokens at a time; the last ones may be fewer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if owes_gradients(self):
            # the bias of the head, beside that of its layer, is one with which nobody computes
            hidden_states = hidden_states + self.bias[:0].sum()
        return _join([self.forward_chunk(chunk) for chunk in _split(hidden_states, self.chunk_size_lm_head)])


def _split(states: Tensor, size: int) -> tuple[Tensor, ...]:
    return states.split(size, dim=1) if size else (states,)


def _join(chunks: Sequence[Tensor]) -> Tensor:
    # joining a single one would copy it
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=1)


class SparseReformerLayer(GradientCheckpointingLayer, ReformerLayer):
    """One layer with autograd as anywhere. Nothing is written to it: seeds of dropout are the encoder's matter."""

    attention: SparseReformerAttention
    feed_forward: SparseChunkReformerFeedForward

    def forward(self, first: Tensor, second: Tensor, text: Text, cache=None) -> tuple[Tensor, Tensor, Tensor | None]:
        change, weights, _ = self.attention(second, text=text, cache=cache)
        first = first + change
        return first, second + self.feed_forward(first), weights


class SparseReformerEncoder(ReformerEncoder):
    """The layers, reversible wherever gradients are wanted.

    Layers keep their states as in any model, unless gradient checkpointing is enabled, where all states or weights are
    asked for, inside a compiled graph, and where something hangs on the call of a layer (hooks, FSDP's shards of its own).
    """

    def forward(
        self, hidden_states: Tensor, text: Text, hashed_from: int, cache: SparseReformerCache | None, with_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor | None, ...] | None]:
        """`[B, N, E]` to `[B, N, 2 E]`, and if asked for the second stream of every layer and the weights.

        Args:
            hashed_from: number of the first hashed layer, from which on all tokens of a cache are computed again.
        """
        new, states, weights = hidden_states.shape[1], [], []
        layers: list[Any] = list(self.layers)
        keeps = with_states or text.with_weights or cache is not None or torch.compiler.is_compiling()
        if not keeps and torch.is_grad_enabled() and all(map(_is_reversible, layers)):
            joined = torch.cat(_run_reversible(layers, text, hidden_states), dim=-1)
        else:
            first = second = hidden_states
            for number, layer in enumerate(layers):
                if cache is not None and number == hashed_from:
                    both = cache.extended(number, torch.cat([first, second], dim=-1), dim=1)
                    first, second = both.chunk(2, dim=-1)
                states.append(second[:, -new:])
                first, second, seen = layer(first, second, text, cache if number < hashed_from else None)
                weights.append(seen)
            joined = torch.cat([first, second], dim=-1)[:, -new:]
            states.append(second[:, -new:])
        out = nn.functional.dropout(self.layer_norm(joined), p=self.dropout, training=self.training)
        return out, tuple(states) if with_states else None, tuple(weights) if text.with_weights else None


def _is_reversible(layer: nn.Module) -> bool:
    """May the halves of a layer be called without the layer, and again in the backward pass?"""
    if not isinstance(layer, SparseReformerLayer) or any(map(_is_sharded, layer.modules())):
        return False
    hooked = (vars(module)[name] for module in (layer, layer.feed_forward) for name in OWN_CALLS)
    if any(hooked) or hooks._has_any_global_hook() or torch._C._are_functorch_transforms_active():
        return False
    # `torch.func.functional_call` puts tensors in the place of parameters, and takes them away before the backward pass
    own = (p for module in layer.modules() for p in vars(module)["_parameters"].values())
    return all(p is None or isinstance(p, nn.Parameter) for p in own)


def _is_sharded(module: nn.Module) -> bool:
    """Is this a module whose parameters FSDP brings together for its call only?"""
    return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__)


@dataclass(frozen=True)
class _Halves:
    """The tensors that are trained of a layer's attention and of its feed-forward."""

    attention: list[Tensor]
    feed_forward: list[Tensor]

    @classmethod
    def of(cls, layer: SparseReformerLayer) -> _Halves:
        return cls(_trained(layer.attention), _trained(layer.feed_forward))


def _trained(module: nn.Module) -> list[Tensor]:
    """What gradients are wanted of: parameters, and tensors in their place (views of FSDP's flat ones, copies of replicas)."""
    found: dict[Tensor, None] = {}
    for child in module.modules():
        own = vars(child)
        for t in (*own["_parameters"].values(), *own.values()):
            if isinstance(t, Tensor) and t.requires_grad:
                found[t] = None
    return list(found)


@dataclass(frozen=True)
class _Moment:
    """What a pass depends on beside its inputs: the state of the random generators, and autocast."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device
    autocast: dict[str, Any] | None  # None on a device that has none

    @classmethod
    def now(cls, like: Tensor) -> _Moment:
        cuda = torch.cuda.get_rng_state(like.device) if like.is_cuda else None
        return cls(torch.get_rng_state(), cuda, like.device, _autocast(like.device.type))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw what was drawn then, in the precision of then."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        with nullcontext() if self.autocast is None else torch.autocast(**self.autocast):
            yield


def _autocast(kind: str) -> dict[str, Any] | None:
    # the question torch.amp.is_autocast_available cannot be traced by torch 2.11
    if kind == "meta":
        return None
    # copies of weights that autocast keeps know no gradient if they were made without autograd, as here
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": False,
    }


def _run_reversible(layers: list[SparseReformerLayer], text: Text, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    halves = [_Halves.of(layer) for layer in layers]
    number: dict[Tensor, int] = {}
    for t in (t for half in halves for t in (*half.attention, *half.feed_forward)):
        number.setdefault(t, len(number))
    numbers = [([number[t] for t in half.attention], [number[t] for t in half.feed_forward]) for half in halves]
    return _reversible(layers, numbers, text, hidden_states, *number)


# of the tensors that are trained of each layer's two halves, their numbers among those of all layers
Numbers = list[tuple[list[int], list[int]]]


class _Reversible(torch.autograd.Function):
    """The last two streams, with gradients of what is trained as of any input: `torch.autograd.grad` finds them."""

    @staticmethod
    def forward(
        ctx, layers: list[SparseReformerLayer], numbers: Numbers, text: Text, hidden_states: Tensor, *trained: Tensor
    ):
        first = second = hidden_states
        ctx.notes = []
        autocast = _autocast(hidden_states.device.type)
        with nullcontext() if autocast is None else torch.autocast(**autocast):
            for layer in layers:
                # drawn ahead, because a second pass draws none
                draw = getattr(layer.attention.self_attention, "draw_rotations", None)
                rotations = None if draw is None else draw(second, text)
                before_attention = _Moment.now(hidden_states)
                change, _, buckets = layer.attention(second, text=text, rotations=rotations)
                first = first + change
                ctx.notes.append((buckets, before_attention, _Moment.now(hidden_states)))
                second = second + layer.feed_forward(first)
        # they are saved so that autograd refuses those that were written to meanwhile
        ctx.save_for_backward(first, second, *trained)
        ctx.layers, ctx.numbers, ctx.text = layers, numbers, text
        return first, second

    @staticmethod
    def backward(ctx, grad_first: Tensor, grad_second: Tensor):
        refuse_second_derivative("a stack of reversible layers")
        first, second, *trained = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(trained)
        # the generators go on as if nothing had been drawn again
        with torch.random.fork_rng([first.device] if first.is_cuda else []):
            for layer, note, numbers in zip(*map(reversed, (ctx.layers, ctx.notes, ctx.numbers)), strict=True):
                buckets, before_attention, before_feed_forward = note
                # FSDP may have made new views of its flat parameters since
                own = _Halves.of(layer)
                feed_forward = _Half(layer.feed_forward.forward_chunk, own.feed_forward, numbers[1])
                chunks = zip(layer.feed_forward.chunks(first), layer.feed_forward.chunks(grad_second), strict=True)
                with before_feed_forward.again():
                    pulled = [feed_forward.pull(chunk, grad, found) for chunk, grad in chunks]
                change, grad = (_join(both) for both in zip(*pulled, strict=True))
                second, grad_first = second - change, grad_first + grad
                attention = _Half(partial(_change, layer.attention, ctx.text, buckets), own.attention, numbers[0])
                with before_attention.again():
                    change, grad = attention.pull(second, grad_first, found)
                first, grad_second = first - change, grad_second + grad
        return None, None, None, grad_first + grad_second, *found


# where a graph is broken it comes here: what CUDA graphs hold would write over what is computed again
_reversible: Any = torch.compiler.disable(_Reversible.apply)


def _change(attention: SparseReformerAttention, text: Text, buckets: Tensor | None, states: Tensor) -> Tensor:
    return attention(states, text=text, buckets=buckets)[0]


@dataclass(frozen=True)
class _Half:
    """Half of a layer, to be computed again, and what is trained of it, with its numbers."""

    function: Callable[[Tensor], Tensor]
    trained: list[Tensor]
    numbers: list[int]

    def pull(self, states: Tensor, grad_out: Tensor, found: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """What it gives, and the gradient of `states`; those of what is trained are added to `found`."""
        if len(self.trained) != len(self.numbers):
            raise RuntimeError("parameters of a Reformer layer were frozen or taken away between forward and backward")
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            out = self.function(leaf)
        grad_out, kind = grad_out.to(out.dtype), states.device.type
        # a backward pass computes in the precision of its forward pass by itself
        with torch.autocast(kind, enabled=False) if is_autocast(states) else nullcontext():
            grad, *grads = torch.autograd.grad(out, [leaf, *self.trained], grad_out, allow_unused=True)
        for number, value in zip(self.numbers, grads, strict=True):
            if value is not None:
                before = found[number]
                found[number] = value if before is None else before + value
        return out.detach(), grad
