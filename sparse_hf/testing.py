"""For tests and reports: see every tensor that a computation makes, and count the bytes of those that live at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that a computation holds at once, those kept for a backward pass included.

        with LiveBytes() as live:
            model(...).loss.backward()
        print(live.peak)

    The number is the same in every run and on every machine, unlike the memory of a process. What was there before, and
    what an operation holds inside itself, is not counted.

    Attributes:
        now: bytes that live now.
        peak: the most that lived at once.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        # storages that others made: they are kept, so that no other storage gets their numbers
        self._others: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            ref = StorageWeakRef(storage)
            if ref.cdata not in self._made:
                self._others.setdefault(ref.cdata, ref)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            ref = StorageWeakRef(storage)
            if ref.cdata not in self._made and ref.cdata not in self._others:
                self._made[ref.cdata] = ref, storage.nbytes()
                self.now += storage.nbytes()
        for cdata in [cdata for cdata, (ref, _) in self._made.items() if ref.expired()]:
            self.now -= self._made.pop(cdata)[1]
        self.peak = max(self.peak, self.now)
        return result


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """The memory behind the tensors of a tree."""
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
