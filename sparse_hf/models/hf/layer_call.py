"""What an attention module asks for, as the ways of answering it read it.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.dropout import Dropout
from ...attention.merge import merge, with_sink
from ...attention.scoring import Scoring
from ...attention.slots.new_tokens import MAX_TOKENS, Filled, slots_attention, takes_slots
from .mask_request import MaskRequest, StackFacts

# out `[B, H, Q, D]` and lse `[B, H, Q]` of some of a layer's pairs
Part = tuple[Tensor, Tensor]


@dataclass(eq=False)
class LayerCall:
    """One call of an attention module.

    Args:
        module: the attention module.
        request: what the model asked its mask function for.
        stack: what the layers of its stack share.
        tensors: q `[B, H, Q, D]`, k and v `[B, G, K, D]`.
        pattern: the text of the layer's pattern, cut to the past if the model is causal.
        scoring: what happens to a score.
        opaque: a mask function that says more than the pattern; None without one.
        sinks: `[H]`, a learned logit in the denominator; None without one.
        dropout: of attention weights.
        backend: the name of what is to compute it.
        kwargs: the other arguments of the attention function.
        filled: what stands in the slots of a streaming cache; None without one.
    """

    module: Any
    request: MaskRequest
    stack: StackFacts
    tensors: tuple[Tensor, Tensor, Tensor]
    pattern: str
    scoring: Scoring
    opaque: Callable | None
    sinks: Tensor | None
    dropout: Dropout
    backend: str
    kwargs: Mapping[str, Any]
    # no defaults, which torch 2.11 cannot trace the making of
    filled: Filled | None

    @property
    def new(self) -> int:
        """Q."""
        return self.tensors[0].shape[2]

    def wants_lse(self, part: Part | None) -> bool:
        """Is the lse read, by `with_rest`?"""
        return self.sinks is not None or part is not None

    def with_rest(self, out: Tensor, lse: Tensor, part: Part | None) -> Part:
        """Out and lse of pairs with those of `part`, and out with the share that learned logits take."""
        if part is not None:
            out, lse = merge([(out, lse), part])
        return (out if self.sinks is None else with_sink(out, lse, self.sinks)), lse

    def over_slots(self, filled: Filled, part: Part | None) -> Tensor:
        """Attention `[B, Q, H, D]` to the slots of a cache as they lie, and to what `part` found."""
        out, lse = slots_attention(
            *self.tensors, filled, self.pattern, self.scoring, wants_lse=self.wants_lse(part)
        )  # fmt: skip
        return tokens_first(self.with_rest(out, lse, part)[0])

    @property
    def goes_by_slots(self) -> bool:
        """Are these new tokens of a static cache, whose graph serves all lengths? It has no gradient."""
        if self.opaque is not None or self.backend != "auto" or torch.is_grad_enabled():
            return False
        return isinstance(self.request.q_offset, Tensor) and self.new < MAX_TOKENS and takes_slots(self.pattern)


def tokens_first(out: Tensor) -> Tensor:
    """`[B, Q, H, D]` of `[B, H, Q, D]`, as modules want it."""
    return out.transpose(1, 2).contiguous()
