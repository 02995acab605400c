"""The weight that attention by `threshold(...)` leaves out, told to whoever asks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass
class LeftOut:
    """What calls within a context left out.

    Attributes:
        each: of each call, in order, `[B, H, Q]`: the share of a query's weights, 0 to 1, that its kept tiles lack; NaN where a
            query sees nothing.
    """

    each: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The mean over queries, heads and calls."""
        return float(self._all().mean())

    @property
    def most(self) -> float:
        """That of the query that loses most."""
        return float(self._all().max())

    def _all(self) -> Tensor:
        if not self.each:
            raise ValueError("no layer with threshold(...) was computed within mass_left_out()")
        found = torch.cat([one.flatten().to("cpu", torch.float64) for one in self.each])
        found = found[~found.isnan()]
        if not len(found):
            raise ValueError("no query within mass_left_out() saw a key: all of them are padding")
        return found


_LISTENERS: ContextVar[tuple[LeftOut, ...]] = ContextVar("listeners", default=())


@contextmanager
def mass_left_out() -> Iterator[LeftOut]:
    """Collect, within, what share of the weights attention by `threshold(...)` leaves out, layer by layer.

    The weights are those of attention to all pairs that the pattern could hold. A layer that is computed again, as gradient
    checkpointing does, counts again.

    Examples:
        >>> from sparse_hf import sparse_attention
        >>> q, k, v = (torch.randn(1, 4, 300, 32) for _ in range(3))
        >>> with mass_left_out() as left:
        ...     out = sparse_attention(q, k, v, "window(20, 0) | threshold(0.9, 16, 16) & window(None, 0)")
        >>> left.each[0].shape, 0 < left.mean < left.most < 1
        (torch.Size([1, 4, 300]), True)
    """
    found = LeftOut()
    token = _LISTENERS.set((*_LISTENERS.get(), found))
    try:
        yield found
    finally:
        _LISTENERS.reset(token)


def is_heard() -> bool:
    """Does anybody listen?"""
    return bool(_LISTENERS.get())


def tell(pattern: str, left_out: Tensor | None) -> None:
    """Tell all listeners; where there is none, say once that nobody asked.

    Args:
        pattern: whose weights they are.
        left_out: of a call, as `LeftOut.each` says; None where it was planned when nobody listened.
    """
    listeners = _LISTENERS.get()
    for listener in listeners:
        if left_out is not None:
            listener.each.append(left_out)
    if not listeners:
        _say(pattern)


@lru_cache
def _say(pattern: str) -> None:
    logger.warning("attention by %s leaves out what weighs little; sparse_hf.mass_left_out() says how much", pattern)
