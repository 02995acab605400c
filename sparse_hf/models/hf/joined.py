"""Self-attention with its projections as one autograd node, for texts that a host takes longer to launch than a GPU to compute.

Queries, keys and values are one product of the states, and so are their gradients. Node by node a layer would be a dozen
operations more, and each of them costs a host as much as a small product.

Legend: B batch, N tokens, H heads, D head dim, E = H * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...attention import route
from ...attention.autograd import refuse_second_derivative_of
from ...attention.backend import AttentionCall, Backend, Given
from ...attention.devices import is_autocast
from ...attention.dropout import NO_DROPOUT, Dropout
from ...attention.scoring import Scoring
from ...pattern import Pattern
from ...plan import BatchInfo
from .answered import asked_alike
from .config import IMPLEMENTATIONS, SparseConfigMixin
from .projections import are_plain, is_host_bound

# the mixin stands before a dense class, whose attributes a type checker finds here
_Module = nn.Module if TYPE_CHECKING else object
# under which classes get a cache, in newer versions and in older ones
CACHES = ("cache", "past_key_values")


@dataclass(frozen=True, eq=False)
class Asked:
    """What a layer asks of attention, of whole texts.

    Args:
        pattern: of all heads.
        head_dim: D.
        scoring: what happens to a score.
        batch: padding, packed documents and marks.
        backend: the name of what is to compute it.
        memo: what layers of the pass share.
        dropout: of attention weights.
    """

    pattern: Pattern
    head_dim: int
    scoring: Scoring
    batch: BatchInfo
    backend: str
    memo: dict[Any, Any]
    dropout: Dropout = NO_DROPOUT

    def call(self, packed: Tensor) -> AttentionCall:
        """Of queries, keys and values side by side, `[B, N, 3 * E]`."""
        q, k, v = unpacked(packed, self.head_dim)
        return AttentionCall(q, k, v, self.pattern, 0, self.scoring, self.dropout, self.batch)

    def route(self, call: AttentionCall) -> Backend:
        """What runs a call, with its plan, decided once a pass."""
        # found by number: a pattern of many heads is slow to compare
        numbers, q = (id(self.pattern), id(self.batch)), call.q
        own = "joined", *numbers, q.shape, q.dtype, q.device, self.backend, bool(self.dropout)
        if own not in self.memo:
            backend = route(call, self.backend)
            self.memo[own] = self.pattern, self.batch, backend, call.chosen_plan
        *_, backend, call.chosen_plan = self.memo[own]
        return backend

    def taken(self, out: Tensor) -> Tensor:
        """What the layer gives, of the output of all heads `[B, N, E]`."""
        return out

    def given_back(self, grad: Tensor) -> Tensor:
        """The gradient of the output of all heads `[B, N, E]`, of that of what the layer gave."""
        return grad


def unpacked(packed: Tensor, head_dim: int) -> Any:
    """Three tensors `[B, H, N, D]` that lie side by side in `packed`, `[B, N, 3 * E]`."""
    batch, length, width = packed.shape
    return packed.view(batch, length, 3, width // (3 * head_dim), head_dim).permute(2, 0, 3, 1, 4).unbind()


def joined_attention(states: Tensor, modules: Sequence[nn.Linear], asked: Asked) -> Tensor:
    """What `asked` takes of attention to states `[B, N, ...]`.

    Args:
        states: what is projected.
        modules: the projections, all of them plain: those to queries, then those to keys, then those to values.
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
        call = asked.call(packed)
        backend = asked.route(call)
        out, lse = backend.forward(call)
        ctx.save_for_backward(states, weight, packed, out, lse)
        ctx.asked, ctx.backend, ctx.plan = asked, backend, call.chosen_plan
        ctx.sizes = [len(parameter) for parameter in parameters[:count]]
        return asked.taken(out.transpose(1, 2).flatten(2))

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative_of(ctx.backend)
        if is_autocast(grad):
            with torch.autocast(grad.device.type, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Those of what `_Joined` took, but of what nobody asks."""
    states, weight, packed, out, lse = ctx.saved_tensors
    call = ctx.asked.call(packed)
    call.chosen_plan = ctx.plan
    grad_out = ctx.asked.given_back(grad).unflatten(2, call.q.shape[1::2]).transpose(1, 2)
    of_packed = torch.empty_like(packed)
    own = unpacked(of_packed, ctx.asked.head_dim)
    into = own if ctx.backend.writes_into else None
    for mine, found in zip(own, ctx.backend.backward(call, Given(out, lse, grad_out, None, into)), strict=False):
        if into is None:
            mine.copy_(found)
    of_packed, count = of_packed.flatten(0, 1), len(ctx.sizes)  # [B * N, 3 * E]
    of_states, _, _, *of_parameters = ctx.needs_input_grad
    grad_states = (of_packed @ weight).view_as(states) if of_states else None
    weights = biases = (None,) * count
    if any(of_parameters[:count]):
        weights = (of_packed.t() @ states.flatten(0, 1)).split(ctx.sizes)
    if any(of_parameters[count:]):
        biases = of_packed.sum(0).split(ctx.sizes)
    return grad_states, None, None, *weights, *biases


class JoinedProjections(_Module):
    """For attention modules as BERT's, whose `query`, `key` and `value` project the same states.

    The first layer of a pass goes its dense class's way. Later ones that ask alike are one node each, where the host is what takes
    time: they are told apart by what they would have handed to the attention function.
    """

    config: SparseConfigMixin
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    num_attention_heads: int
    attention_head_size: int
    scaling: float

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *rest, **kwargs):
        asked = self._asked(hidden_states, attention_mask, rest, kwargs) if is_host_bound(hidden_states) else None
        if asked is None:
            return super().forward(hidden_states, attention_mask, *rest, **kwargs)
        return joined_attention(hidden_states, (self.query, self.key, self.value), asked), None

    def _asked(self, states: Tensor, mask: Any, rest: tuple, kwargs: dict[str, Any]) -> Asked | None:
        """What a layer before has been answered, if this one may go by it."""
        backend = IMPLEMENTATIONS.get(str(self.config._attn_implementation))
        if backend is None or any(value is not None for value in (*rest, *map(kwargs.get, CACHES))):
            return None
        head_dim, p = self.attention_head_size, self.dropout.p if self.training else 0.0
        told = {name: value for name, value in kwargs.items() if name not in CACHES}
        sizes = torch.Size((states.shape[0], self.num_attention_heads, states.shape[1], head_dim))
        how = backend, self.scaling, p
        alike = asked_alike(self, (sizes, sizes, states.device), mask, how, told)
        known = None if alike is None else mask.memo.get(alike)
        if known is None or not known.joins(self) or not are_plain((self.query, self.key, self.value)):
            return None
        return Asked(known.pattern, head_dim, known.scoring, known.batch, known.backend, mask.memo, Dropout.draw(p))
