"""Crosses: one rule that is tested over many parameters.

A test with the marker `cross` has so many cases that they tell the same again and again. `make test` runs as many of them as
have every value of every parameter, and `make test-crosses` runs the rest. The marker's arguments name the parameters that
count, all of them if there are none; a tuple of names asks for their combinations. `by` gives the values instead, of all
parameters of a case.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

import pytest

# cases with these markers are not in `make test`, whatever the others are
OTHER_TARGETS = ("slow", "gpu", "transformers", "rest")


def mark_rest(items: Iterable[pytest.Item]) -> None:
    """Give the marker `rest` to the cases of crosses that `make test` leaves out."""
    crosses: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("cross") and not any(map(item.get_closest_marker, OTHER_TARGETS)):
            crosses[item.nodeid.partition("[")[0]].append(item)
    for cases in crosses.values():
        kept = spanning([values_of(item) for item in cases])
        for number, item in enumerate(cases):
            if number not in kept:
                item.add_marker(pytest.mark.rest)


def values_of(item: pytest.Item) -> list[Hashable]:
    """The values of one case, each with the name or the names that it belongs to."""
    params, marker = item.callspec.params, item.get_closest_marker("cross")
    if "by" in marker.kwargs:
        return list(enumerate(marker.kwargs["by"](**params)))
    names = marker.args or tuple(params)
    groups = [(name,) if isinstance(name, str) else name for name in names]
    return [tuple((name, *_key(params[name])) for name in group) for group in groups]


def _key(value: object) -> tuple[str, Hashable]:
    # 1 and True are equal, and two values
    return type(value).__name__, value if isinstance(value, Hashable) else repr(value)


def spanning(cases: Sequence[Sequence[Hashable]]) -> set[int]:
    """Numbers of cases that have every value together, each value about as often as others of its kind.

    Example:
        >>> spanning([("a", 1), ("a", 2), ("b", 1), ("b", 2)])
        {0, 3}
    """
    having: dict[Hashable, list[int]] = defaultdict(list)
    for number, values in enumerate(cases):
        for value in values:
            having[value].append(number)
    kept, used = set(), Counter()

    def gain(number: int) -> tuple[int, int]:
        return sum(not used[value] for value in cases[number]), -sum(used[value] for value in cases[number])

    # what few cases have comes first, since most of the others comes with it
    for value in sorted(having, key=lambda value: len(having[value])):
        if not used[value]:
            best = max(having[value], key=gain)
            kept.add(best)
            used.update(cases[best])
    return kept


def slow_but_for(fast: Iterable, names: Iterable, sample: Iterable | None = None) -> list:
    """All of `names` as parameters, of which the fast suite takes these, and `make test` only the sample of them.

    A tuple is of several parameters.
    """
    sample = fast if sample is None else sample
    marks = {**dict.fromkeys(fast, pytest.mark.rest), **dict.fromkeys(sample, ())}
    return [
        pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=marks.get(name, pytest.mark.slow))
        for name in names
    ]


def sampled(sample: Iterable, names: Iterable) -> list:
    """All of `names` as parameters, of which `make test` takes these."""
    return slow_but_for(names, names, sample)
