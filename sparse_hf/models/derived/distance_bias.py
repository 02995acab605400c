"""Attention with a learned bias by distance, as T5 has it: counterparts whose bias is linear in the length."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..hf.derive import subclass

# a mixin stands before a dense class, whose attributes a type checker finds here
if TYPE_CHECKING:

    class _Attention(nn.Module):
        is_decoder: bool
        has_relative_attention_bias: bool
        relative_attention_num_buckets: int
        relative_attention_max_distance: int
        relative_attention_bias: nn.Embedding
        _relative_position_bucket: Any
else:
    _Attention = object


class DistanceBias(_Attention):
    """The bias is a vector of distances per head, and never a tensor of two lengths."""

    def compute_bias(self, query_length: int, key_length: int, device=None, past_seen_tokens=0) -> Tensor:
        """The bias `[num_heads, past + queries - 1 + keys]` at the distances (key - query) from `1 - past - queries` up."""
        distances = torch.arange(1 - int(past_seen_tokens) - query_length, key_length, device=device)
        # some classes take from themselves what others want to be told
        told = inspect.signature(self._relative_position_bucket).parameters
        more = {
            "bidirectional": not self.is_decoder,
            "num_buckets": self.relative_attention_num_buckets,
            "max_distance": self.relative_attention_max_distance,
        }
        buckets = self._relative_position_bucket(distances, **{k: v for k, v in more.items() if k in told})
        return self.relative_attention_bias(buckets).T

    def forward(self, hidden_states, *args, **kwargs):
        takes = inspect.signature(super().forward).parameters
        if (
            "position_bias" in takes
            and not self.has_relative_attention_bias
            and self._bias_of(takes, args, kwargs) is None
        ):
            # cross-attention has none, and the parent would make `[1, heads, queries, keys]` of zeros
            kwargs = {**dict(zip(list(takes)[1:], args, strict=False)), **kwargs}
            return super().forward(hidden_states, **{**kwargs, "position_bias": hidden_states.new_zeros(0)})
        return super().forward(hidden_states, *args, **kwargs)

    @staticmethod
    def _bias_of(takes: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        return {**dict(zip(list(takes)[1:], args, strict=False)), **kwargs}.get("position_bias")


def biased_parts(module: ModuleType, home: str) -> dict[type, type]:
    """Counterparts of the attention classes of a modelling file that have such a bias.

    Args:
        home: the module that they become attributes of.
    """
    made = {}
    for dense in list(vars(module).values()):
        has_bias = isinstance(dense, type) and issubclass(dense, nn.Module) and dense.__module__ == module.__name__
        if has_bias and {"compute_bias", "_relative_position_bucket"} <= set(vars(dense)) and _tells_past(dense):
            made[dense] = subclass(home, (DistanceBias, dense))
    return made


def _tells_past(dense: Any) -> bool:
    return "past_seen_tokens" in inspect.signature(dense.compute_bias).parameters
