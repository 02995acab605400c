"""What stays dense: of one pattern, and of several the one whose answers move least for the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..pattern import Pattern
from .api import PIECES
from .budget import Budget
from .layers import dense_layers, layers_text
from .pieces import Found
from .probes.base import Setup
from .probes.recall import questions_of
from .search import Search, Unit
from .spending import Spending, TooLittleError
from .subject import Contender


@dataclass(frozen=True, eq=False)
class Choice:
    """What stays dense beside a pattern, as `found` tells it; `moved` is how far answers are from the dense model's (KL)."""

    spending: Spending
    dense: list[Unit]
    found: Found

    @property
    def pattern(self) -> Pattern:
        return self.spending.search.pattern

    @property
    def moved(self) -> float:
        return self.spending.search.losses([self.dense])[0]


def best_choice(setup: Setup, patterns: Sequence[Pattern], budget: Budget, folder: Path | None) -> Choice:
    """The choice for each of the candidates' patterns, and of several that by which answers move least.

    What the others came to stands under "patterns" of what was found.

    Raises:
        ValueError: a budget that no pattern fits, or that leaves too little beside each.
    """
    choices: list[Choice] = []
    told: list[Found] = []
    refused: TooLittleError | None = None
    for pattern, local in zip(patterns, setup.candidates[-len(patterns) :], strict=True):
        search = search_of(setup, pattern, folder, local, with_text=budget.rank == "text")
        spending = Spending(search, budget, max(setup.settings.all_lengths))
        try:
            choices.append(Choice(spending, *choose(spending)))
        except TooLittleError as error:
            refused = error
            told.append({"pattern": str(pattern), "refused": str(error)})
    if refused is not None and not choices:
        raise refused
    if len(patterns) == 1:
        return choices[0]
    moved = [choice.moved for choice in choices]
    best = choices[min(range(len(choices)), key=lambda i: moved[i])]
    for choice, kl in zip(choices, moved, strict=True):
        told.append({"pattern": str(choice.pattern), "layers": choice.found["layers"], "answers_moved": kl})
    return Choice(best.spending, best.dense, {**best.found, "patterns": told})


def search_of(
    setup: Setup, pattern: Pattern, folder: Path | None, local: Contender | None = None, with_text: bool = False
) -> Search:
    """A search by the questions of `setup`, and by its texts where they count, too.

    `local` has `pattern` in every layer, by default the last candidate. Pieces are kept in `folder`.
    """
    questions = [question for _, question in questions_of(setup)]
    local = local or setup.candidates[-1]
    return Search(setup, questions, local, pattern, None if folder is None else folder / PIECES, with_text)


def evenly_spaced(search: Search, count: int) -> str:
    """As many dense layers at equal distances, as `layers` takes them."""
    return dense_layers(search.layers[i * len(search.layers) // count] for i in range(count))


def choose(spending: Spending) -> tuple[list[Unit], Found]:
    """What stays dense, with the rankings that it comes from: by layers, by heads, or by what moves the answers less.

    Raises:
        ValueError: a budget of more than can be dense, or of too little.
    """
    search, budget = spending.search, spending.budget
    count, groups = spending.counts()
    units: dict[str, list[Unit]] = {}
    ranking: list[list] = []
    steps: list[list] = []
    needs_heads = budget.by != "layers" or budget.rank == "attention"
    heads = search.copied if needs_heads else {}
    if budget.by != "heads":
        if budget.rank != "attention":
            ranking = [[layer, kl] for layer, kl in search.ranking.items()]
            steps = [[layer, kl] for layer, kl in search.choose(count)]
            units["layers"] = [Unit(layer) for layer, _ in steps]
        else:
            sums = {
                layer: sum(weight for unit, weight in heads.items() if unit.layer == layer) for layer in search.layers
            }
            units["layers"] = [Unit(layer) for layer in sorted(sums, key=lambda layer: -sums[layer])[:count]]
    if budget.by != "layers":
        units["heads"] = list(heads)[:groups]
    moved = dict(zip(units, search.losses(list(units.values())), strict=True)) if budget.by == "both" else {}
    by = min(moved, key=lambda name: moved[name]) if moved else next(iter(units))
    dense = spending.within(units[by])
    return dense, {
        "layers": layers_text(search.patterns(dense), search.patterns([])),
        "by": by,
        "count": len(dense) if by == "layers" else count,
        "answers_moved": moved,
        "ranking": ranking,
        "steps": steps,
        "heads": [[f"{unit.layer}.{unit.group}", weight] for unit, weight in heads.items()],
    }
