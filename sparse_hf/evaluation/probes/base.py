"""What a probe is: a question to the dense model and to each candidate, in pieces of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..passes import Passes, Reading
from ..pieces import Finished, Found
from ..pieces import Piece as Piece
from ..settings import Settings
from ..subject import Contender, Subject
from ..texts import Sample, Text

# ranges of positions into which a text is cut for figures by position
RANGES = 16


@dataclass(frozen=True, eq=False)
class Setup:
    """What probes look at: the model and its candidates, texts and samples of them, settings."""

    subject: Subject
    texts: tuple[Text, ...]
    samples: tuple[Sample, ...]
    settings: Settings
    passes: Passes = field(default_factory=Passes)
    # what is made once, by name
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def candidates(self) -> tuple[Contender, ...]:
        """All but the dense model."""
        return self.subject.contenders[1:]

    def dense_reading(self, sample: Sample) -> Reading:
        return self.passes.dense(self.subject.dense.model, sample.digest, sample.ids)

    def reading(self, contender: Contender, sample: Sample) -> Reading:
        """What a contender makes of a sample."""
        if contender.is_dense:
            return self.dense_reading(sample)
        return self.passes.other(contender.name, contender.model, sample.digest, sample.ids)


Work = Callable[[Setup, Contender, Sample], Found]


class Probe(Protocol):
    """A question. One file holds one; `table.PROBES` lists them.

    `name` is what a user says, and what results are filed under.
    """

    name: ClassVar[str]

    def why_not(self, setup: Setup) -> str | None:
        """Why the model or the texts cannot be asked, with the remedy; None if they can. Runs nothing heavy."""
        ...

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        """The work, cut into pieces."""
        ...

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        """The result, from all pieces, as JSON."""
        ...


def of_samples(
    probe: str, setup: Setup, contenders: Sequence[Contender], work: Work, stage: int, **what: Any
) -> Iterator[Piece]:
    """A piece for each sample and contender; those of one contender follow each other, by their stage.

    `what` are further things that results depend on.
    """
    for s, sample in enumerate(setup.samples):
        for contender in contenders:
            what = {**what, "text": sample.name, "ids": sample.digest}
            weights = f"{setup.subject.dense.weights} {contender.weights}"
            order = (0, s, setup.subject.contenders.index(contender), stage)
            yield Piece(
                probe, contender.name, what, weights, order,
                partial(work, setup, contender, sample),
            )  # fmt: skip


def of_contenders(
    probe: str, setup: Setup, work: Callable[[Setup, Contender, Any], Found], given: Any, what: dict[str, Any],
    place: tuple[int, int],
) -> Iterator[Piece]:  # fmt: skip
    """A piece for each contender, of the same `given`; `place` is that of the first in the order of all pieces."""
    for c, contender in enumerate(setup.subject.contenders):
        yield Piece(
            probe, contender.name, what, contender.weights, (*place, c), partial(work, setup, contender, given)
        )  # fmt: skip


def by_candidate(finished: Sequence[Finished]) -> dict[str, list[Found]]:
    """What was found of each contender."""
    found: dict[str, list[Found]] = {}
    for piece in finished:
        found.setdefault(piece.candidate, []).append(piece.found)
    return found


def range_edges(length: int) -> list[int]:
    """Where ranges of positions begin, and the end of the last."""
    count = min(RANGES, length)
    return [round(i * length / count) for i in range(count + 1)]


def range_sums(values: Tensor, positions: Tensor, length: int) -> list[float]:
    """Values of tokens, added up by the range that their position is in."""
    edges = torch.tensor(range_edges(length)[1:-1])
    where = torch.bucketize(positions.cpu(), edges, right=True)
    sums = torch.zeros(min(RANGES, length), dtype=torch.float64)
    return sums.index_add_(0, where, values.double().cpu()).tolist()


def added(lists: Sequence[Sequence[float]]) -> list[float]:
    """Lists of one length, added up entry by entry."""
    return [sum(entries) for entries in zip(*lists, strict=True)]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float | None]:
    """Quotients, None where nothing was counted."""
    return [a / b if b else None for a, b in zip(over, under, strict=True)]
