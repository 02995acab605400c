"""Attention over chosen keys that are made of latents (multi-head latent attention, arXiv:2405.04434), which heads share.

Keys and values of a head are `latent @ up`, so that `q @ (latent @ up_k).T = (q @ up_k.T) @ latent.T`: with the projection at the
query, all heads read the same latent once, and nothing of a head's own is gathered.

Legend: B batch, H heads, Q queries, K keys, D head dim without position, E head dim of values, L numbers of a latent, P numbers of
a head that positions turn; N keys that are chosen for a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.triton import walk
from ..devices import shared_bytes
from .api import attend_chosen
from .latent_passes import LatentAttention, forward

MAX_LATENT, MAX_TURNED = 512, 64
# shared memory of a GPU's multiprocessor that the kernels take
SHARED_BYTES = 227 << 10


@dataclass(frozen=True, eq=False)
class Latents:
    """What keys and values are made of.

    Args:
        latent: `[B, K, L]`.
        turned: `[B, K, P]`, the numbers of keys that say their positions, which heads share.
        up_key: `[H, D, L]`: the key of head h is `up_key[h] @ latent`, then `turned`.
        up_value: `[H, E, L]`.
    """

    latent: Tensor
    turned: Tensor
    up_key: Tensor
    up_value: Tensor

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """`[B, H, K, D + P]` and `[B, H, K, E]`."""
        latent, heads = self.latent[:, None], self.up_key.shape[0]
        turned = self.turned[:, None].expand(-1, heads, -1, -1)
        return torch.cat([latent @ self.up_key.mT, turned], -1), latent @ self.up_value.mT


def why_not(query: Tensor, latents: Latents) -> str | None:
    """Why the kernel cannot attend to latents, or None."""
    if query.device.type not in walk.DEVICES or not walk.IS_INSTALLED:
        return f"it needs a GPU and query is on {query.device}"
    if shared_bytes(query.device) < SHARED_BYTES:
        return f"its kernel needs a GPU with {SHARED_BYTES >> 10} KiB of shared memory, as an H100 has"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernel computes in 16 bits and query is {query.dtype}"
    if latents.latent.shape[2] > MAX_LATENT or latents.turned.shape[2] > MAX_TURNED:
        return f"its kernel takes latents of up to {MAX_LATENT} numbers and {MAX_TURNED} for positions"
    return None


def attend_latent(query: Tensor, latents: Latents, chosen: Tensor, *, scale: float) -> Tensor:
    """Softmax attention of each query over the keys that are chosen for it, made of latents: `[B, H, Q, E]`.

    Differentiable in the query and in all of the latents. On a GPU with the memory of an H100, in 16 bits, heads read latents where
    they are, forward and backward, with the same bits in every run; otherwise keys and values are made and `attend_chosen` runs.

    Args:
        query: `[B, H, Q, D + P]`, with the part that positions turn last.
        latents: keys and values.
        chosen: `[B, 1, Q, N]` int32 or int64: the keys of each query, by index; below 0 is none. B may be 1.
        scale: what multiplies the products.

    Examples:
        >>> latents = Latents(torch.randn(1, 50, 16), torch.randn(1, 50, 8), torch.randn(4, 12, 16), torch.randn(4, 10, 16))
        >>> attend_latent(torch.randn(1, 4, 50, 20), latents, torch.randint(50, (1, 1, 50, 6)), scale=0.2).shape
        torch.Size([1, 4, 50, 10])
    """
    if why_not(query, latents):
        return attend_chosen(query, *latents.keys_and_values(), chosen, scale=scale)[0]
    parts = latents.latent, latents.turned, latents.up_key, latents.up_value
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, *parts)):
        found: Any = LatentAttention.apply(query, latents, chosen, scale, *parts)
        return found
    return forward(query, latents, chosen, scale)
