"""See queries and keys as they reach attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# the implementation that sparse models take of themselves
NAME = "sparse"


@contextmanager
def observed(model: PreTrainedModel, see: Callable[[Any, Tensor, Tensor, dict[str, Any]], None]) -> Iterator[None]:
    """Have `see(module, q, k, arguments)` called for each layer's attention of a sparse model, before it is computed.

    `q` is `[B, H, Q, D]`, `k` is `[B, G, K, D]`. Other models go on as they are, and so does this one afterwards.
    """
    own, inner = {id(module) for module in model.modules()}, ALL_ATTENTION_FUNCTIONS[NAME]

    def attention(module, query, key, value, attention_mask, **arguments):
        if id(module) in own:
            see(module, query, key, arguments)
        return inner(module, query, key, value, attention_mask, **arguments)

    # over the entry that all share, which stays beneath
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]


def layer_of(module: Any, seen: int) -> int:
    """The number of an attention module's layer; where it does not know it, how many were seen before."""
    own = module.__dict__.get("layer_idx")
    return seen if own is None else own
