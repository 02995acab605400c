"""Passes of attention over chosen latents, forward and backward, some queries at a time.

A latent's gradient is a sum over the queries that chose it, which have other latents each. So each query writes what it adds to its
own, as one product over its heads, and what a latent was given is added in the order of the queries: no sum is made by atomics.

Legend: B batch, H heads, Q queries, K keys, D head dim without position, E head dim of values, L numbers of a latent, P numbers of
a head that positions turn; N keys that are chosen for a query; a piece has m queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..autograd import refuse_second_derivative
from ..launch import launch, power_of_two, strides_of
from ..strides import like, readable

if TYPE_CHECKING:
    from .latent import Latents

# numbers of projected queries, and of what queries add to gradients of latents, that exist at once
MAX_PROJECTED, MAX_ADDED = 1 << 27, 1 << 29
# heads and chosen keys of a tile, warps of a program, and tiles that are on their way: the fastest on an H200
HEADS, KEYS, WARPS, STAGES = 64, 64, 8, 2
# of the backward pass, whose program holds twice as much
GRADIENT_KEYS, GRADIENT_STAGES = 32, 2
# rows that are added at a time
ADDED_ROWS = 4


def forward(query: Tensor, latents: Latents, chosen: Tensor, scale: float) -> Tensor:
    """Out `[B, H, Q, E]`."""
    out = like(query, latents.up_value.shape[1])
    for some, found, _ in _projected(query, latents, chosen, scale):
        out[:, :, some] = found @ latents.up_value.mT
    return out


def _projected(query: Tensor, latents: Latents, chosen: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some queries at a time, their sums of latents `[B, H, m, L]` and lse `[B, H, m]`."""
    batch, heads, queries, _ = query.shape
    for some in _pieces(queries, batch * heads * latents.latent.shape[2], MAX_PROJECTED):
        plain, turned = query[:, :, some].split((latents.up_key.shape[1], latents.turned.shape[2]), -1)
        yield some, *attend_projected(plain @ latents.up_key, turned, latents, chosen[:, 0, some], scale)


def _pieces(queries: int, numbers: int, most: int) -> Iterator[slice]:
    """So many queries at a time that what each has `numbers` of comes to `most` of them."""
    step = max(1, most // max(1, numbers))
    for first in range(0, queries, step):
        yield slice(first, min(first + step, queries))


def attend_projected(
    query: Tensor, turned: Tensor, latents: Latents, chosen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Sums of latents `[B, H, Q, L]` and lse `[B, H, Q]` of queries `[B, H, Q, L]` and `[B, H, Q, P]`, chosen `[B or 1, Q, N]`."""
    from . import latent_kernels

    query, turned, latent, place = (readable(t) for t in (query, turned, latents.latent, latents.turned))
    index = chosen.int().contiguous()
    batch, heads, queries, _ = query.shape
    out, lse = like(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel():
        constants = _constants(heads, latent, place)
        launch(
            latent_kernels.forward, (queries * -(-heads // constants["BR"]), batch),
            (query, turned, latent, place, index, out, lse),
            (*strides_of(query, turned), *latent.stride()[:2], *place.stride()[:2], *strides_of(out)),
            (scale, queries, latent.shape[1], index.shape[2], index.stride(0) if index.shape[0] > 1 else 0),
            {"BN": KEYS, **constants}, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out, lse


def _constants(heads: int, latent: Tensor, place: Tensor) -> dict:
    """What the kernels are compiled for."""
    wide, of_positions = latent.shape[2], place.shape[2]
    return {
        "H": heads, "BR": min(HEADS, max(16, power_of_two(heads))), "L": wide, "BL": max(16, power_of_two(wide)), "P": of_positions,
        "BP": max(16, power_of_two(of_positions)), "PRECISION": "ieee",
    }  # fmt: skip


class LatentAttention(torch.autograd.Function):
    """`forward` with a backward pass; the sums of latents are kept for it."""

    @staticmethod
    def forward(ctx, query: Tensor, latents: Latents, chosen: Tensor, scale: float, *parts: Tensor) -> Tensor:
        """`parts` are the tensors of `latents`, so that autograd sees them."""
        out, sums = like(query, latents.up_value.shape[1]), like(query, latents.latent.shape[2])
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for some, found, of_found in _projected(query, latents, chosen, scale):
            out[:, :, some] = found @ latents.up_value.mT
            sums[:, :, some], lse[:, :, some] = found, of_found
        ctx.save_for_backward(query, chosen, out, sums, lse, *parts)
        ctx.scale, ctx.kind = scale, type(latents)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("attention over chosen latents")
        query, chosen, out, sums, lse, *parts = ctx.saved_tensors
        grad_query, *grads = _Gradients(query, ctx.kind(*parts), chosen, (out, sums, lse), ctx.scale).of(grad_out)
        return grad_query, None, None, None, *grads


class _Gradients:
    """The gradients of a call, a piece of the queries of a batch row at a time."""

    def __init__(self, query: Tensor, latents: Latents, chosen: Tensor, found: tuple[Tensor, ...], scale: float):
        self.query, self.latents, self.scale = query, latents, scale
        self.out, self.sums, self.lse = found
        self.latent, self.turned = readable(latents.latent), readable(latents.turned)
        self.index = chosen[:, 0].int().contiguous()
        self.grad_query = like(query)
        # of latents and what is turned, side by side
        width, work = self.latent.shape[2] + self.turned.shape[2], {"dtype": torch.float32, "device": query.device}
        self.grad_latent = torch.zeros(*self.latent.shape[:2], width, **work)
        self.grad_up_key = torch.zeros(latents.up_key.shape, **work)
        self.grad_up_value = torch.zeros(latents.up_value.shape, **work)

    def of(self, grad_out: Tensor) -> tuple[Tensor, ...]:
        """Of the query and of the four tensors of latents, given that of the output."""
        batch, _, queries, _ = self.query.shape
        numbers = self.index.shape[2] * self.grad_latent.shape[2]
        for b in range(batch if self.query.numel() else 0):
            for some in _pieces(queries, numbers, MAX_ADDED):
                self._add_piece(b, some, grad_out[b, :, some])
        dtype, widths = self.query.dtype, (self.latent.shape[2], self.turned.shape[2])
        found = *self.grad_latent.split(widths, -1), self.grad_up_key, self.grad_up_value
        return self.grad_query, *(t.to(dtype) for t in found)

    def _add_piece(self, b: int, some: slice, grad_out: Tensor) -> None:
        latents, dim = self.latents, self.latents.up_key.shape[1]
        plain, turned = self.query[b, :, some].split((dim, self.turned.shape[2]), -1)  # [H, m, D], [H, m, P]
        index = self.index[b if len(self.index) > 1 else 0, some]  # [m, N]
        given = self._side_by_side(grad_out @ latents.up_value, plain @ latents.up_key, turned)
        delta = (grad_out.float() * self.out[b, :, some].float()).sum(-1)  # [H, m]
        shares, grads = self._shares(given, index, b, (self.lse[b, :, some], delta))
        self._add_to_latents(shares.mT @ given, index, self.grad_latent[b])
        projected, grad_turned = grads.transpose(0, 1).split((self.latent.shape[2], self.turned.shape[2]), -1)
        self.grad_query[b, :, some, :dim] = projected @ latents.up_key.mT
        self.grad_query[b, :, some, dim:] = grad_turned
        self.grad_up_key += plain.mT @ projected
        self.grad_up_value += grad_out.mT @ self.sums[b, :, some]

    def _side_by_side(self, grads: Tensor, query: Tensor, turned: Tensor) -> Tensor:
        """What chosen latents are multiplied by, or get: `[m, 2 H, L + P]`, gradients of sums before queries.

        Each is of `[H, m, L]` or `[H, m, P]`.
        """
        heads, some, wide = grads.shape
        found = grads.new_zeros(some, 2 * heads, wide + turned.shape[2])
        found[:, :heads, :wide] = grads.transpose(0, 1)
        found[:, heads:, :wide] = query.transpose(0, 1)
        found[:, heads:, wide:] = turned.transpose(0, 1)
        return found

    def _shares(self, given: Tensor, index: Tensor, b: int, of_rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What weighs the rows of `given` in the gradients of chosen keys, `[m, 2 H, N]`: weights, and gradients of products.

        And the gradients of projected queries, `[m, H, L + P]`. `of_rows` are lse, and by how much the gradients of weights are less than
        their products, `[H, m]`.
        """
        from . import latent_kernels

        queries, heads = index.shape[0], self.query.shape[1]
        # as wide as what is written at once
        shares = given.new_empty(queries, 2 * heads, -(-index.shape[1] // 16) * 16)
        grads = given.new_empty(queries, heads, given.shape[2])
        latent, turned = self.latent[b], self.turned[b]
        constants = _constants(heads, latent[None], turned[None])
        launch(
            latent_kernels.gradients, (queries * -(-heads // constants["BR"]), 1),
            (given, latent, turned, index, *of_rows, shares, grads),
            (latent.stride(0), turned.stride(0), *of_rows[0].stride(), *of_rows[1].stride(), shares.stride(1)),
            (self.scale, latent.shape[0], index.shape[1]),
            {"BN": GRADIENT_KEYS, **constants}, num_warps=WARPS, num_stages=GRADIENT_STAGES,
        )  # fmt: skip
        return shares[..., : index.shape[1]], grads

    def _add_to_latents(self, added: Tensor, index: Tensor, total: Tensor) -> None:
        """Add `[m, N, L + P]` to the keys of `index` `[m, N]`, in `[K, L + P]`."""
        from . import latent_kernels

        keys, width = total.shape
        key = index.flatten()
        ordered, order = key.where((key >= 0) & (key < keys), keys).sort(stable=True)
        offsets = torch.searchsorted(
            ordered, torch.arange(keys + 1, dtype=key.dtype, device=key.device), out_int32=True
        )
        launch(
            latent_kernels.add_rows, (keys, 1), (added, order, offsets, total), (), (),
            {"W": width, "BW": power_of_two(width), "BS": ADDED_ROWS}, num_warps=4,
        )  # fmt: skip
