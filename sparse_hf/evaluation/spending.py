"""What layouts take of a budget: pairs, bytes of the cache, or seconds on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from ..bench import environment
from ..bench.measure import Timer
from ..pattern import Pattern
from ..units import duration
from .budget import Budget, cache_share, pairs_share
from .heads import groups_of
from .pieces import Found, Piece, finish
from .probes.cost import read_once, text_of_length
from .search import Search, Unit

# passes that are timed, of which the middle one counts, and seconds behind which none begins
PASSES, TIMED_S = 3, 60.0
# what sums of shares may be off by
ROUNDING = 1e-9


class TooLittleError(ValueError):
    """A budget that a pattern takes alone."""


@dataclass(frozen=True, eq=False)
class Spending:
    """What each layout takes, as a share of what the dense model takes.

    A layout's seconds are those of the pattern in every layer, and for each layer with dense heads what a layer with as many
    takes beyond that: a model is timed whose layers all have as many. What is chosen is timed once more as it is.

    Args:
        search: whose layouts are spent on; seconds are kept in its folder, with the machine that they are of.
        budget: that must not be passed.
        length: tokens of a text.
        seconds: of a call, measured; by default a median of some.
    """

    search: Search
    budget: Budget
    length: int
    seconds: Callable[[Callable[[], object]], float] | None = None
    _shares: dict[tuple[str, str], float] = field(default_factory=dict)
    _measured: dict[tuple[str, ...], float] = field(default_factory=dict)

    def counts(self) -> tuple[int, int]:
        """How many layers can stay dense, and how many groups of heads in place of layers.

        Raises:
            TooLittleError: none.
            ValueError: more than there are.
        """
        of, by, layers = self.budget.of, self.budget.by, self.search.layers
        if of == "layers":
            count = max(1, round(self.budget.share * len(self.search.dense_patterns)))
            if count > len(layers):
                raise ValueError(
                    f"a budget of {self.budget.share:.3g} is {count} dense layers, and {len(layers)} can be dense; lower it"
                )
            return count, count * self._groups
        by_layers = self._most([Unit(layer) for layer in layers])
        by_heads = self._most(list(self.search.copied)) if by != "layers" else 0
        if not (by_layers if by == "layers" else by_heads):
            raise TooLittleError(self._too_little())
        # where heads alone fit, one layer stands beside them
        return max(1, by_layers), by_heads

    def within(self, dense: Sequence[Unit]) -> list[Unit]:
        """What was chosen, timed as a whole, without what is too much of it.

        Raises:
            TooLittleError: nothing is left.
        """
        fitting = self._within(dense)
        if not fitting:
            raise TooLittleError(self._too_little())
        return fitting

    def told(self, dense: Sequence[Unit]) -> Found:
        """What a layout takes in numbers: the share that is dense, that of the budget, and seconds for one of time."""
        counted = sum(1 if unit.group is None else 1 / self._groups for unit in dense)
        found: Found = {"dense": counted / len(self.search.dense_patterns)}
        if self.budget.of in ("pairs", "cache"):
            found["spent"] = self._share(dense)
        if self.budget.of == "time":
            found |= {
                "spent": self._whole_s(dense) / self._dense_s,
                "dense_s": self._dense_s,
                "local_s": self._whole_s([]),
                "chosen_s": self._whole_s(dense),
                "length": self.length,
                "machine": self._machine,
            }
        return found

    def pairs(self, dense: Sequence[Unit]) -> float:
        """The share of a decoder's pairs that a layout has, a mean over layers."""
        return self._added(self.search.patterns(dense), "pairs") / len(self.search.dense_patterns)

    def _most(self, ranked: Sequence[Unit]) -> int:
        """How many of these, from the first on, can be dense."""
        most, count = self.budget.share + ROUNDING, 0
        while count < len(ranked) and self._share(ranked[: count + 1]) <= most:
            count += 1
        return len(self._within(ranked[:count]))

    def _within(self, dense: Sequence[Unit]) -> list[Unit]:
        """These without the last ones, until they take no more time than the budget: parts may be slower together."""
        fitting, most = list(dense), (self.budget.share + ROUNDING) * self._dense_s if self.budget.of == "time" else 0.0
        while self.budget.of == "time" and fitting and self._whole_s(fitting) > most:
            fitting.pop()
        return fitting

    def _too_little(self) -> str:
        share, of, alone = self.budget.share, self.budget.of, self._share([])
        what, longer = "them", ""
        if of == "time":
            what, longer = (
                f"the {duration(self._dense_s)} of the dense model ({self._machine})",
                ", or ask about longer texts",
            )
        return (
            f"a budget of {share} of the {of} leaves nothing for dense layers: {self.search.pattern} alone takes {alone:.3f} of {what} "
            f"at {self.length:,} tokens; raise it, or narrow the pattern{longer}"
        )

    def _share(self, dense: Sequence[Unit]) -> float:
        """What a layout takes of what the dense model takes."""
        of = self.budget.of
        if of == "time":
            return self._layout_s(dense) / self._dense_s
        return self._added(self.search.patterns(dense), of) / self._added(self.search.dense_patterns, of)

    def _added(self, patterns: Sequence[str], of: str) -> float:
        share_of = pairs_share if of == "pairs" else cache_share
        for text in patterns:
            if (of, text) not in self._shares:
                self._shares[of, text] = share_of(Pattern.parse(text), self.length)
        return sum(self._shares[of, text] for text in patterns)

    @property
    def _groups(self) -> int:
        return groups_of(self.search.local.config)

    @cached_property
    def _machine(self) -> str:
        here = environment(self.search.setup.subject.device)
        return f"{here['hardware']}, torch {here['versions']['torch']}, threads: {here['threads']}"

    @cached_property
    def _dense_s(self) -> float:
        return self._pass_s(self.search.dense_patterns)

    def _whole_s(self, dense: Sequence[Unit]) -> float:
        return self._pass_s(self.search.patterns(dense))

    def _layout_s(self, dense: Sequence[Unit]) -> float:
        """Seconds of a layout, added up from what layers of each kind take."""
        of_layers = Counter()
        for unit in dense:
            of_layers[unit.layer] += self._groups if unit.group is None else 1
        local_s, found = self._whole_s([]), 0.0
        for groups, layers in Counter(of_layers.values()).items():
            all_alike = [Unit(layer, group) for layer in self.search.layers for group in range(groups)]
            found += layers * (self._whole_s(all_alike) - local_s) / len(self.search.layers)
        return local_s + found

    def _pass_s(self, patterns: Sequence[str]) -> float:
        """Seconds of a pass over a text by a model with these patterns, timed once."""
        key = tuple(patterns)
        if key not in self._measured:
            what = {"time": list(patterns), "length": self.length, "machine": self._machine}
            piece = Piece("tune", "time", what, self.search.weights, (0,), partial(self._timed, patterns))
            (done,) = finish([piece], self.search.folder, self.search.setup.settings.progress)
            self._measured[key] = done.found["seconds"]
        return self._measured[key]

    @torch.inference_mode()
    def _timed(self, patterns: Sequence[str]) -> Found:
        setup, local = self.search.setup, self.search.local
        setup.passes.forget()
        self.search.lay_out(patterns)
        ids = text_of_length(setup, self.length).to(local.model.device)
        measure = self.seconds or Timer(ids.device, PASSES, TIMED_S).seconds
        return {"seconds": measure(partial(read_once, local, ids))}
