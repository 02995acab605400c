"""Attention with a learned bias by distance, as T5 has it: counterparts whose bias is linear in the length."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..distances import distances_of
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

    # names of the arguments that the dense class takes, read once, because a graph could not read them; written by `biased_parts`
    bucket_arguments: frozenset[str]
    forward_arguments: tuple[str, ...]

    def compute_bias(self, query_length: int, key_length: int, device=None, past_seen_tokens=0) -> Tensor:
        """The bias `[num_heads, distances]`, see `distances`."""
        distances = distances_of(query_length, key_length, past_seen_tokens, device)
        # some classes take from themselves what others want to be told
        more = {
            "bidirectional": not self.is_decoder,
            "num_buckets": self.relative_attention_num_buckets,
            "max_distance": self.relative_attention_max_distance,
        }
        told = {k: v for k, v in more.items() if k in self.bucket_arguments}
        return self.relative_attention_bias(self._relative_position_bucket(distances, **told)).T

    def forward(self, hidden_states, *args, **kwargs):
        if "position_bias" in self.forward_arguments and not self.has_relative_attention_bias:
            kwargs, args = {**dict(zip(self.forward_arguments, args, strict=False)), **kwargs}, ()
            if kwargs.get("position_bias") is None:
                # cross-attention has none, and the parent would make `[1, heads, queries, keys]` of zeros
                kwargs["position_bias"] = hidden_states.new_zeros(0)
        return super().forward(hidden_states, *args, **kwargs)


def biased_parts(module: ModuleType, home: str) -> dict[type, type]:
    """Counterparts of the attention classes of a modelling file that have such a bias.

    Args:
        home: the module that they become attributes of.
    """
    made = {}
    for dense in list(vars(module).values()):
        has_bias = isinstance(dense, type) and issubclass(dense, nn.Module) and dense.__module__ == module.__name__
        if has_bias and {"compute_bias", "_relative_position_bucket"} <= set(vars(dense)) and _tells_past(dense):
            read = {
                "bucket_arguments": frozenset(_bucket_arguments(dense)),
                "forward_arguments": tuple(inspect.signature(dense.forward).parameters)[2:],
            }
            made[dense] = subclass(home, (DistanceBias, dense), **read)
    return made


def _tells_past(dense: Any) -> bool:
    return "past_seen_tokens" in inspect.signature(dense.compute_bias).parameters


def _bucket_arguments(dense: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(dense._relative_position_bucket).parameters)
