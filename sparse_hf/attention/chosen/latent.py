"""Attention over chosen keys that are made of latents (multi-head latent attention, arXiv:2405.04434), which heads share.

Keys and values of a head are `latent @ up`, so that `q @ (latent @ up_k).T = (q @ up_k.T) @ latent.T`: with the projection at the
query, all heads read the same latent once, and nothing of a head's own is gathered.

Legend: B batch, H heads, Q queries, K keys, D head dim without position, E head dim of values, L numbers of a latent, P numbers of
a head that positions turn; N keys that are chosen for a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.triton import walk
from ..launch import launch, power_of_two, strides_of
from ..strides import like, readable
from .api import attend_chosen

# numbers of projected queries that exist at once
MAX_PROJECTED = 1 << 27
# heads and chosen keys of a tile, warps of a program, and tiles that are on their way: the fastest on an H200
HEADS, KEYS, WARPS, STAGES = 64, 64, 8, 2
MAX_LATENT, MAX_TURNED = 512, 64


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
    tensors = query, latents.latent, latents.turned, latents.up_key, latents.up_value
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "its kernel has no backward pass"
    if query.device.type not in walk.DEVICES or not walk.IS_INSTALLED:
        return f"it needs a GPU and query is on {query.device}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernel computes in 16 bits and query is {query.dtype}"
    if latents.latent.shape[2] > MAX_LATENT or latents.turned.shape[2] > MAX_TURNED:
        return f"its kernel takes latents of up to {MAX_LATENT} numbers and {MAX_TURNED} for positions"
    return None


def attend_latent(query: Tensor, latents: Latents, chosen: Tensor, *, scale: float) -> Tensor:
    """Softmax attention of each query over the keys that are chosen for it, made of latents: `[B, H, Q, E]`.

    On a GPU without gradients, heads read latents where they are; otherwise keys and values are made and `attend_chosen` runs.

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
    batch, heads, queries, _ = query.shape
    out = like(query, latents.up_value.shape[1])
    step = max(1, MAX_PROJECTED // max(1, batch * heads * latents.latent.shape[2]))
    for first in range(0, queries, step):
        some = slice(first, min(first + step, queries))
        plain, turned = query[:, :, some].split((latents.up_key.shape[1], latents.turned.shape[2]), -1)
        found, _ = attend_projected(plain @ latents.up_key, turned, latents, chosen[:, 0, some], scale)
        out[:, :, some] = found @ latents.up_value.mT
    return out


def attend_projected(
    query: Tensor, turned: Tensor, latents: Latents, chosen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Sums of latents `[B, H, Q, L]` and lse `[B, H, Q]` of queries `[B, H, Q, L]` and `[B, H, Q, P]`, chosen `[B or 1, Q, N]`."""
    from . import latent_kernels

    query, turned, latent, place = (readable(t) for t in (query, turned, latents.latent, latents.turned))
    index = chosen.int().contiguous()
    batch, heads, queries, wide = query.shape
    out, lse = like(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel():
        tile = min(HEADS, max(16, power_of_two(heads)))
        of_positions = turned.shape[3]
        launch(
            latent_kernels.forward, (queries * -(-heads // tile), batch), (query, turned, latent, place, index, out, lse),
            (*strides_of(query, turned), *latent.stride()[:2], *place.stride()[:2], *strides_of(out)),
            (scale, queries, latent.shape[1], index.shape[2], index.stride(0) if index.shape[0] > 1 else 0),
            {"H": heads, "BR": tile, "BN": KEYS, "L": wide, "BL": max(16, power_of_two(wide)), "P": of_positions,
             "BP": max(16, power_of_two(of_positions)), "PRECISION": "ieee"}, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out, lse
