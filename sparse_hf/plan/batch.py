"""`BatchInfo`: what one batch adds to positions, and the plans that were made of it.

Legend: B batch rows, K keys.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# decisions about calls without batch data that are remembered: each holds its plan, and as many plans of lengths are kept
MAX_DECISIONS = 64


@dataclass(frozen=True, eq=False)
class BatchInfo:
    """Padding, packed documents and marks of one batch, in key coordinates.

    A model makes one for each forward pass and hands it to all its layers, which so share plans. `memo` holds what was
    found for this batch; it dies with it. The tensors must not be written to while it is in use.

    Args:
        padding: `[B, K]` bool, true on real tokens.
        segments: `[B, K]` integers that number the packed documents.
        marks: `[B, K]` bool, true on the tokens that `marked()` speaks of.
    """

    padding: Tensor | None = None
    segments: Tensor | None = None
    marks: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.padding, self.segments, self.marks

    @property
    def is_empty(self) -> bool:
        """Is there nothing to say beside lengths?"""
        return self.padding is None and self.segments is None and self.marks is None

    def content(self) -> tuple:
        """A key that is equal for batches with equal tensors, and for no others.

        Identity and version are no proof: numpy, DLPack and `.data` write to a tensor without torch hearing of it.
        """
        if "content" not in self.memo:
            self.memo["content"] = tuple(map(_fingerprint, self.tensors))
        return self.memo["content"]

    def without_ones(self) -> BatchInfo:
        """The same batch, without a padding mask that says that all tokens are real; many models always make one."""
        if "without_ones" not in self.memo:
            padding = self.padding
            is_ones = padding is not None and padding.ndim == 2 and bool(padding.all())
            # itself it must not hold, or it would outlive its last user
            self.memo["without_ones"] = of_batch(None, self.segments, self.marks) if is_ones else None
        found = self.memo["without_ones"]
        return self if found is None else found

    def remember(self, key: Any, value: Any) -> Any:
        """Keep `value` under `key` for as long as this batch lives; returns it."""
        if self is NOTHING and len(self.memo) >= MAX_DECISIONS:
            self.memo.clear()
        self.memo[key] = value
        return value


def of_batch(padding: Tensor | None, segments: Tensor | None, marks: Tensor | None) -> BatchInfo:
    """The `BatchInfo` of these tensors; `NOTHING` of none."""
    if padding is None and segments is None and marks is None:
        return NOTHING
    return BatchInfo(padding, segments, marks)


# what calls without batch data share
NOTHING = BatchInfo()


def _fingerprint(t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    t = t.detach()
    data = t.to("cpu").contiguous()
    content = data.view(torch.uint8) if data.ndim and data.numel() else data.reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(content.numpy().tobytes(), digest_size=32).digest()
    return tuple(t.shape), t.dtype, str(t.device), digest


class PlanCache:
    """The last plans, or tables of them, by what they are of; safe for threads.

    Args:
        size: how many are kept.
        most_bytes: what they hold together at most, of what `put` is told; the last one is kept whatever it holds.
    """

    def __init__(self, size: int, most_bytes: int = 0):
        self.size, self.most_bytes, self._plans, self._lock = size, most_bytes, {}, threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key not in self._plans:
                return None
            # the newest stands last
            self._plans[key] = self._plans.pop(key)
            return self._plans[key][0]

    def put(self, key: Any, plan: Any, held_bytes: int = 0) -> Any:
        """Keep `plan`, unless another thread was sooner; returns the one that is kept."""
        with self._lock:
            plan, _ = self._plans.setdefault(key, (plan, held_bytes))
            while len(self._plans) > self.size or len(self._plans) > 1 and self.held_bytes > self.most_bytes:
                self._plans.pop(next(iter(self._plans)))
            return plan

    @property
    def held_bytes(self) -> int:
        return sum(held for _, held in self._plans.values())

    def clear(self) -> None:
        with self._lock:
            self._plans.clear()
