"""Attention modules whose keys and values are made of latents, which are left as they are where all heads can read them together.

Legend: B batch, H heads, K keys, L numbers of a latent, P numbers of a key that positions turn, D and E head dims without these.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...attention.chosen import Latents
from ...attention.chosen.latent import why_not
from ..hf.chosen_keys import LATENTS, learning, refuse_graphs
from ..hf.projections import are_plain

# may the layer that is computed leave its latents as they are?
_MAY_SHARE: ContextVar[bool] = ContextVar("may share latents", default=False)


class LatentAttention(torch.nn.Module):
    """Before a dense module with latents among the bases: makes no keys and values of its heads where a kernel needs none."""

    # of the dense class
    config: Any
    kv_b_proj: Any
    num_heads: int
    qk_nope_head_dim: int
    v_head_dim: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        refuse_graphs()
        # by position or by name, since names have changed
        forward: Any = super().forward
        cached = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None or len(args) > 3
        own = _MAY_SHARE.set(self._may_share(args, kwargs) and (not cached or caches_latents(type(self))))
        told = LATENTS.set(None)
        try:
            return forward(*args, **kwargs)
        finally:
            _MAY_SHARE.reset(own)
            LATENTS.reset(told)

    def _may_share(self, args: tuple, kwargs: dict) -> bool:
        states = args[0] if args else kwargs["hidden_states"]
        drops = self.training and getattr(self.config, "attention_dropout", 0) > 0
        autocast = torch.is_autocast_enabled(states.device.type)
        # who learns looks at the keys
        return self._is_weight(states.device) and not drops and not autocast and learning() is None

    def _is_weight(self, device: torch.device) -> bool:
        """Is the projection its weight alone, all of which is there?"""
        projection = self.kv_b_proj
        if not are_plain([projection], with_bias=False):
            return False
        return (
            projection.weight.shape == (projection.out_features, projection.in_features)
            and projection.weight.device == device
        )

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, H, K, D + P]` and values `[B, H, K, E]` of latents `[B, 1, K, L]` and `[B, 1, K, P]`, or what has their shapes."""
        latents = self._latents(kv_nope, k_rot) if _MAY_SHARE.get() else None
        if latents is None or why_not(kv_nope, latents):
            dense: Any = super()
            return dense.expand_kv(kv_nope, k_rot)
        batch, _, keys, _ = kv_nope.shape
        widths = self.qk_nope_head_dim + k_rot.shape[-1], self.v_head_dim
        LATENTS.set(latents)
        key, value = (kv_nope.new_zeros(1, 1, 1, 1).expand(batch, self.num_heads, keys, width) for width in widths)
        return key, value

    def _latents(self, kv_nope: Tensor, k_rot: Tensor) -> Latents:
        """What keys and values are made of, of a projection that is its weight."""
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, D + E, L]
        return Latents(kv_nope[:, 0], k_rot[:, 0], *up.split([self.qk_nope_head_dim, self.v_head_dim], 1))


@cache
def caches_latents(kind: type) -> bool:
    """Does a dense class keep latents in its cache, and not the keys and values that it makes of them?"""
    dense = next(base for base in kind.__mro__ if "forward" in vars(base) and not issubclass(base, LatentAttention))
    return "cache" in inspect.signature(vars(dense)["forward"]).parameters
