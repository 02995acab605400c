"""For tests and reports: see every tensor that a computation makes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationInterceptor(TorchDispatchMode):
    """Records every tensor with two sequence-length dimensions that torch makes.

        with AllocationInterceptor(length=12928) as seen:
            model(...).loss.backward()
        assert not seen.quadratic

    A dimension counts as a length if it is one of `lengths` or at most `slack` above one of them
    (padding), or is the number of blocks of a length. Choose lengths that no other dimension of the
    model equals: not the vocabulary, nor the hidden size.

    Args:
        length: the sequence length, or several (queries and keys).
        block_sizes: block sizes whose number per sequence counts as a length too.
        slack: how far above a length a dimension may be and still count.
    """

    def __init__(self, length: int | Iterable[int], block_sizes: Iterable[int] = (64, 128, 256), slack: int = 8):
        super().__init__()
        lengths = [length] if isinstance(length, int) else list(length)
        counts = [-(-n // size) for n in lengths for size in block_sizes]
        self.ranges = [range(n, n + slack + 1) for n in lengths] + [range(n, n + 2) for n in counts if n > 64]
        self.quadratic: list[tuple[str, tuple[int, ...]]] = []
        self.largest = 0
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._look(str(function), tuple(leaf.shape))
                self.largest = max(self.largest, leaf.numel())
        return result

    def _look(self, name: str, shape: tuple[int, ...]) -> None:
        if sum(any(size in lengths for lengths in self.ranges) for size in shape) >= 2:
            self.quadratic.append((name, shape))
