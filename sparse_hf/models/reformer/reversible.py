"""Reformer's reversible layers (arXiv:2001.04451, section 3): activations are computed again from outputs, not kept.

A layer takes two streams of states, X1 and X2: Y1 = X1 + attention(X2), Y2 = X2 + feed_forward(Y1). So X2 = Y2 -
feed_forward(Y1) and X1 = Y1 - attention(X2), and a backward pass needs nothing but the last outputs, and of each layer the
buckets and the state of the random generator.

Legend: B batch, N tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.reformer.modeling_reformer import (
    ChunkReformerFeedForward,
    ReformerAttention,
    ReformerEncoder,
    ReformerLayer,
    ReformerOnlyLMHead,
)

from .attention import SparseReformerCache, Text


class SparseReformerAttention(ReformerAttention):
    """Layer norm, attention, projection; the attention inside sees its pattern."""

    def forward(self, hidden_states: Tensor, text: Text, **given) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The change of the other stream `[B, N, E]`, the weights if asked for, and the buckets of a hashed layer."""
        out, weights, buckets = self.self_attention(self.layer_norm(hidden_states), text=text, **given)
        return self.output(out), weights, buckets


class SparseChunkReformerFeedForward(ChunkReformerFeedForward):
    """The feed-forward, `chunk_size_feed_forward` tokens at a time; the last ones may be fewer."""

    def forward(self, attention_output: Tensor) -> Tensor:
        return _join([self.forward_chunk(part) for part in self.parts(attention_output)])

    def parts(self, states: Tensor) -> tuple[Tensor, ...]:
        return _split(states, self.chunk_size_feed_forward)


class SparseReformerOnlyLMHead(ReformerOnlyLMHead):
    """The head, `chunk_size_lm_head` tokens at a time; the last ones may be fewer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _join([self.forward_chunk(part) for part in _split(hidden_states, self.chunk_size_lm_head)])


def _split(states: Tensor, size: int) -> tuple[Tensor, ...]:
    return states.split(size, dim=1) if size else (states,)


def _join(parts: Sequence[Tensor]) -> Tensor:
    # joining one part would copy it
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class SparseReformerLayer(GradientCheckpointingLayer, ReformerLayer):
    """One layer with autograd as anywhere. Nothing is written to it: seeds of dropout are the encoder's matter."""

    def forward(self, first: Tensor, second: Tensor, text: Text, cache=None) -> tuple[Tensor, Tensor, Tensor | None]:
        change, weights, _ = self.attention(second, text=text, cache=cache)
        first = first + change
        return first, second + self.feed_forward(first), weights


class SparseReformerEncoder(ReformerEncoder):
    """The layers, reversible wherever gradients are wanted.

    Asked for the states of all layers or for weights, or inside a compiled graph, they are kept as in any model, unless
    gradient checkpointing is enabled; where they are reversible it changes nothing, because what it saves is not there.
    """

    def forward(
        self, hidden_states: Tensor, text: Text, hashed_from: int, cache: SparseReformerCache | None, with_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """`[B, N, E]` to `[B, N, 2 E]`, and if asked for the second stream of every layer and the weights.

        Args:
            hashed_from: number of the first hashed layer, from which on all tokens of a cache are computed again.
        """
        new, states, weights = hidden_states.shape[1], [], []
        keeps = with_states or text.with_weights or torch.compiler.is_compiling()
        if not keeps and torch.is_grad_enabled() and cache is None:
            own = [(_trained(layer.attention), _trained(layer.feed_forward)) for layer in self.layers]
            joined = torch.cat(_reversible(list(self.layers), own, text, hidden_states, *_all(own)), dim=-1)
        else:
            first = second = hidden_states
            for number, layer in enumerate(self.layers):
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


# what is trained of the attention and of the feed-forward part of each layer
Own = list[tuple[list[nn.Parameter], list[nn.Parameter]]]


class _Reversible(torch.autograd.Function):
    """The last two streams, with gradients of the parameters as of any input: `torch.autograd.grad` finds them."""

    @staticmethod
    def forward(
        ctx, layers: list[SparseReformerLayer], own: Own, text: Text, hidden_states: Tensor, *parameters: Tensor
    ):
        first = second = hidden_states
        ctx.notes = []
        for layer in layers:
            # drawn ahead, because a second pass draws none
            draw = getattr(layer.attention.self_attention, "draw_rotations", None)
            rotations = None if draw is None else draw(second, text)
            before_attention = _random_state(hidden_states)
            change, _, buckets = layer.attention(second, text=text, rotations=rotations)
            first = first + change
            ctx.notes.append((buckets, before_attention, _random_state(hidden_states)))
            second = second + layer.feed_forward(first)
        # parameters are saved so that autograd refuses those that were written to meanwhile
        ctx.save_for_backward(first, second, *parameters)
        ctx.layers, ctx.own, ctx.text, ctx.autocast = layers, own, text, _autocast(hidden_states)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_first: Tensor, grad_second: Tensor):
        first, second, *_ = ctx.saved_tensors
        found: dict[Tensor, Tensor] = {}
        # the generators go on as if nothing had been drawn again
        with torch.random.fork_rng([first.device] if first.is_cuda else []):
            for layer, (of_attention, of_feed_forward), (buckets, before_attention, before_feed_forward) in zip(
                *map(reversed, (ctx.layers, ctx.own, ctx.notes)), strict=True
            ):
                with _again(before_feed_forward, first, ctx.autocast):
                    parts = zip(layer.feed_forward.parts(first), layer.feed_forward.parts(grad_second), strict=True)
                    pulled = [_pull(layer.feed_forward.forward_chunk, *part, of_feed_forward, found) for part in parts]
                    change, grad = map(_join, zip(*pulled, strict=True))
                second, grad_first = second - change, grad_first + grad
                with _again(before_attention, first, ctx.autocast):
                    attend = partial(_change, layer.attention, ctx.text, buckets)
                    change, grad = _pull(attend, second, grad_first, of_attention, found)
                first, grad_second = first - change, grad_second + grad
        return None, None, None, grad_first + grad_second, *map(found.get, _all(ctx.own))


# where a graph is broken it comes here: parts that CUDA graphs hold would write over what is computed again
_reversible = torch.compiler.disable(_Reversible.apply)


def _trained(part: nn.Module) -> list[nn.Parameter]:
    return [p for p in part.parameters() if p.requires_grad]


def _all(own: Own) -> dict[nn.Parameter, None]:
    """Each parameter once, in order."""
    return dict.fromkeys(p for layer in own for part in layer for p in part)


def _change(attention: SparseReformerAttention, text: Text, buckets: Tensor | None, states: Tensor) -> Tensor:
    return attention(states, text=text, buckets=buckets)[0]


def _pull(
    function, states: Tensor, grad_out: Tensor, own: list[Tensor], found: dict[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute `function` again, and its gradients: that of `states` is returned, those of parameters are added to `found`."""
    with torch.enable_grad():
        leaf = states.detach().requires_grad_()
        out = function(leaf)
        grad, *grads = torch.autograd.grad(out, [leaf, *own], grad_out.to(out.dtype), allow_unused=True)
    for parameter, value in zip(own, grads, strict=True):
        if value is not None:
            found[parameter] = found[parameter] + value if parameter in found else value
    return out.detach(), grad


def _random_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(like.device) if like.is_cuda else None


def _autocast(like: Tensor) -> dict | None:
    kind = like.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@contextmanager
def _again(state: tuple[Tensor, Tensor | None], like: Tensor, autocast: dict | None):
    """Draw what was drawn then, in the precision of then."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], like.device)
    with nullcontext() if autocast is None else torch.autocast(**autocast):
        yield
