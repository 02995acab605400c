"""A text in parts: who holds which tokens, and what the whole batch says of them.

Legend: B batch rows, R rows that are told apart (1 if all are alike), N tokens of the whole text, S ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor

from ..plan import BatchInfo
from ..plan.sequences import Sequences, find_sequences


def even_parts(length: int, ranks: int) -> list[int]:
    """Tokens of each rank's part, as even as can be."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


@dataclass(eq=False)
class SplitText:
    """One batch whose rows are split over ranks; every rank knows what is said of all tokens.

    Attributes:
        sizes: tokens of each rank's part.
        batch: padding, packed documents and marks of whole rows, `[B, N]` on the CPU, each None where there is nothing to say.
        memo: what layers of the pass share.
    """

    sizes: list[int]
    rows: int
    batch: BatchInfo
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        return sum(self.sizes)

    @cached_property
    def bounds(self) -> list[int]:
        """Where each rank's part begins, and the end of the last."""
        return list(accumulate(self.sizes, initial=0))

    @cached_property
    def sequences(self) -> Sequences:
        """Where sequences begin and end, `[R, N]`."""
        return find_sequences(self.length, *self.batch.tensors)

    @cached_property
    def rows_apart(self) -> int:
        """R."""
        return self.sequences.rows

    def sequence_at(self, row: int, index: int) -> tuple[int, int] | None:
        """First and last token of the sequence that holds a token; None of padding before the first."""
        start, end = self.sequences.start, self.sequences.end
        if start is None or end is None:
            return 0, self.length - 1
        first = int(start[row, index])
        return None if first < 0 else (first, int(end[row, index]))

    def marks_of(self, row: int) -> Tensor | None:
        """Which tokens of a row are marked, `[N]`."""
        return None if self.sequences.marks is None else self.sequences.marks[row]
