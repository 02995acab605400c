"""Self-attention with its projections as one autograd node, for texts that a host takes longer to launch than a GPU to compute.

The rows of all tokens and those of marked ones are heads of one call: each token keeps what its half gave. So a layer is one
product, one call of attention and one choice, and of each the gradient; node by node it would be forty launches more.

Legend: B batch, N tokens, H heads (of both halves), D head dim, E = H * D / 2, P projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...attention import route
from ...attention.backend import AttentionCall, Backend, Given
from ...attention.devices import is_autocast
from ...attention.dropout import NO_DROPOUT
from ...attention.scoring import Scoring
from ...pattern.per_head import PerHead
from .tokens import Tokens


@dataclass(frozen=True, eq=False)
class Asked:
    """What a layer asks of attention.

    Args:
        pattern: of all heads; the first half of them are those of all tokens.
        head_dim: D.
        tokens: what the batch says of its tokens.
        backend: the name of what is to compute it.
    """

    pattern: PerHead
    head_dim: int
    tokens: Tokens
    backend: str

    def call(self, packed: Tensor) -> tuple[AttentionCall, Backend]:
        """Of queries, keys and values side by side, `[B, N, 3 * H * D]`; and what runs it."""
        q, k, v = packed.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()
        scoring, batch = Scoring(self.head_dim**-0.5), self.tokens.batch
        call = AttentionCall(q, k, v, self.pattern, 0, scoring, NO_DROPOUT, batch)
        # found by number: a pattern of many heads is slow to compare
        own = "joined", id(self.pattern), q.shape, q.dtype, self.backend
        if own not in batch.memo:
            backend = route(call, self.backend)
            batch.remember(own, (self.pattern, backend, call.chosen_plan))
        _, backend, call.chosen_plan = batch.memo[own]
        return call, backend


def joined_attention(states: Tensor, modules: Sequence[nn.Linear], asked: Asked) -> Tensor:
    """Attention `[B, N, E]` of states `[B, N, E]`.

    Args:
        states: what is projected.
        modules: the projections, all of them plain: to queries, keys and values, of each that of all tokens and that of marked ones.
        asked: what is asked of attention.
    """
    parameters = [module.weight for module in modules] + [module.bias for module in modules]
    if not is_autocast(states):
        return _Joined.apply(states, asked, states.dtype, *parameters)
    with torch.autocast(states.device.type, enabled=False):
        return _Joined.apply(states, asked, torch.get_autocast_dtype(states.device.type), *parameters)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, asked: Asked, dtype: torch.dtype, *parameters: Tensor):
        count = len(parameters) // 2
        weight, bias = (torch.cat(some).to(dtype) for some in (parameters[:count], parameters[count:]))
        states = states.to(dtype)
        packed = nn.functional.linear(states, weight, bias)
        call, backend = asked.call(packed)
        out, lse = backend.forward(call)
        is_marked, shares = asked.tokens.halves(dtype)
        ctx.save_for_backward(states, weight, packed, out, lse, shares)
        ctx.asked, ctx.sizes = asked, [len(parameter) for parameter in parameters[:count]]
        of_all, of_marked = out.transpose(1, 2).flatten(2).chunk(2, dim=2)
        return torch.where(is_marked, of_marked, of_all)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, weight, packed, out, lse, shares = ctx.saved_tensors
        call, backend = ctx.asked.call(packed)
        # each half has the gradient of its tokens, and 0 of the others
        grad_out = (grad[:, :, None] * shares).view(*grad.shape[:2], *call.q.shape[1::2]).transpose(1, 2)
        grads = backend.backward(call, Given(out, lse, grad_out, None))[:3]
        of_packed = torch.cat([t.transpose(1, 2).flatten(2) for t in grads], dim=2).flatten(0, 1)  # [B * N, 3 * H * D]
        grad_states = (of_packed @ weight).view_as(states)
        of_weights, of_biases = of_packed.t() @ states.flatten(0, 1), of_packed.sum(0)
        return grad_states, None, None, *of_weights.split(ctx.sizes), *of_biases.split(ctx.sizes)
