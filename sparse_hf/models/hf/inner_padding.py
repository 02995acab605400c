"""Padding inside a row, as between a cached prefix and questions of several lengths behind it.

Positions count real tokens, and plans count from the first of a text, so that padding before and behind it shifts
nothing, but padding inside would. Where a batch has such, queries, keys and values are put in another order for
attention, padding first, and what comes out is put back. That copies the keys of a cache in every layer.

Legend: B batch, H heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...pattern import Pattern, causal, full
from ...plan import BatchInfo, build_plan, of_batch

# an argument of forward passes: somebody has looked at the mask already, and no padding stands between tokens of a text
CHECKED = "padding_is_outer"


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def counts_positions(text: str) -> bool:
    """Does a pattern ask where tokens stand, beyond which is earlier?"""
    return _counts_positions(text)


@lru_cache(maxsize=256)
def _counts_positions(text: str) -> bool:
    pattern = Pattern.parse(text)
    return any(one not in (full(), causal()) for one in pattern.heads or (pattern,))


def has_inner_padding(real: Tensor, documents: Tensor | None) -> Tensor:
    """Is there padding between tokens of one text? A bool on the device.

    Args:
        real: `[B, K]` bool, true on real tokens.
        documents: `[B, K]` numbers of packed documents, between which padding shifts nothing.
    """
    begins = real[:, 1:] & ~real[:, :-1]
    if documents is None:
        return (begins.sum(1) + real[:, 0] > 1).any()
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last_real = torch.where(real, index, -1).cummax(1).values[:, :-1]
    same = documents[:, 1:] == documents.gather(1, last_real.clamp(min=0))
    return (begins & (last_real >= 0) & same).any()


def has_padding_in_the_way(real: Tensor) -> bool:
    """Will there be padding inside a row once tokens are added behind a prompt?

    Args:
        real: `[B, K]` of the prompt, not zero on real tokens.
    """
    real = real.bool()
    return bool(has_inner_padding(torch.nn.functional.pad(real, (0, 1), value=True), None))


@dataclass(frozen=True, eq=False)
class PaddingFirst:
    """The tokens of a batch in another order: padding, then real tokens as they came.

    Queries are the last of the keys. Of a row with padding among its queries, the first ones stand for tokens that are no
    queries, and nobody reads what they give.
    """

    keys: Tensor  # [B, K]: index in the row of each key, in the new order
    queries: Tensor  # [B, Q]: the same of queries, counted from the first
    real_queries: Tensor  # [B, Q] bool, in the old order
    batch: BatchInfo  # in the new order

    @classmethod
    def of(cls, given: BatchInfo, queries: int) -> PaddingFirst:
        """The order for a batch whose last keys are the queries."""
        real, segments, marks = given.tensors
        assert real is not None
        keys, of_queries = _padding_first(real), real[:, real.shape[1] - queries :]
        moved = (None if t is None else t.gather(1, keys) for t in (real, segments, marks))
        return cls(keys, _padding_first(of_queries), of_queries, of_batch(*moved))

    @property
    def length(self) -> int:
        """Keys."""
        return self.keys.shape[1]

    def queries_first(self, query: Tensor) -> Tensor:
        """Queries `[B, H, Q, D]` in the new order."""
        return query if query.shape[2] == 1 else _take(query, self.queries)

    def keys_first(self, key: Tensor) -> Tensor:
        """Keys or values `[B, H, at least K, D]` in the new order."""
        return _take(key, self.keys)

    def back(self, out: Tensor) -> Tensor:
        """What queries gave `[B, H, Q, D]`, in the old order; 0 where they are padding."""
        out = out if out.shape[2] == 1 else _take(out, self.queries.argsort(1))
        return out.masked_fill(~self.real_queries[:, None, :, None], 0)

    def weights_back(self, weights: Tensor, keys: int) -> Tensor:
        """Weights `[B, H, Q, K]` in the old order, of `keys` keys."""
        weights = _take(self.back(weights).transpose(2, 3), self.keys.argsort(1)).transpose(2, 3)
        return torch.nn.functional.pad(weights, (0, keys - self.length))

    def mask_function(self, inner: Callable) -> Callable:
        """A mask function of the old order, for the new one."""

        def of_new_order(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return inner(b, h, self.keys[b, q], self.keys[b, k])

        return of_new_order

    def pattern_as_mask(self, pattern) -> Callable:
        """The mask function, of the old order, of a pattern whose positions count real tokens."""
        real, segments, marks = self.batch.tensors
        plan = build_plan(pattern, self.length, key_padding_mask=real, segment_ids=segments, marks=marks)
        # slots of a cache behind the last key are no real tokens
        rank, last = self.keys.argsort(1), self.length - 1

        def of_old_order(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return plan.allows(b, 0, rank[b, q.clamp(max=last)], rank[b, k.clamp(max=last)])

        return of_old_order


def _padding_first(real: Tensor) -> Tensor:
    return real.int().argsort(dim=1, stable=True)


def _take(t: Tensor, order: Tensor) -> Tensor:
    index = order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
    return t.gather(2, index)


@torch.library.custom_op("sparse_hf::without_inner_padding", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def without_inner_padding(real: Tensor, documents: Tensor | None) -> Tensor:
    """`real`, for compiled code, which cannot choose by what a mask holds.

    Raises:
        ValueError: there is padding inside a row.
    """
    if bool(has_inner_padding(real, documents)):
        raise ValueError(
            "attention_mask has padding inside a row, between real tokens, which compiled code cannot count around; run this "
            "batch without torch.compile (generate: disable_compile=True), or pad on the left; prompts that are padded on the right "
            "have such padding before all tokens that follow"
        )
    return real.clone()


@without_inner_padding.register_fake
def _(real: Tensor, documents: Tensor | None) -> Tensor:
    return torch.empty_like(real)
