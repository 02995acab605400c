"""The pictures of a report: what is drawn of which figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...units import size
from ..pieces import Found
from .svg import Axis, Grid, Series, heat_map, lines, points

# an axis grows by factors where the greatest value is so many times the middle one; divergences that are drawn there at the least
FACTORS, LEAST_KL = 20, 1e-4


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows in a sentence. `is_wide` takes a row of the page for itself."""

    title: str
    text: str
    picture: str
    is_wide: bool = False


class Letters:
    """The letter and number of each candidate, the same in all pictures and in the table."""

    def __init__(self, names: Sequence[str]):
        self.numbers = {name: i for i, name in enumerate(names)}

    def letter(self, name: str) -> str:
        number = self.numbers[name]
        return chr(ord("A") + number) if number < 26 else str(number)

    def series(self, name: str, at: Sequence[tuple[float, float | None]]) -> Series:
        return Series(self.letter(name), name, self.numbers[name], at)


def figures(result: Found, letters: Letters) -> Iterator[Figure]:
    """All pictures of what was measured, in the order of the page."""
    probes = result["probes"]
    yield from _frontier(result, letters)
    for name, draw in DRAWN.items():
        if name in probes:
            yield from draw(probes[name], result, letters)


def _whole(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 or x == int(x) else f"{x:g}"


def _share(x: float) -> str:
    return f"{x:.0%}"


def _frontier(result: Found, letters: Letters) -> Iterator[Figure]:
    """Quality against cost: what is measured of each."""
    probes = result["probes"]
    costs = probes.get("cost", {}).get("candidates")
    if not costs:
        return
    kinds: list[tuple[str, str, Callable[[Found], Any], Axis]] = [
        ("perplexity", "perplexity", lambda one: one["perplexity"], Axis("perplexity (less is better)", log=True)),
        ("recall", "recall", lambda one: one["recalled"], Axis("facts recalled (more is better)", _share)),
        ("masked", "hidden tokens named", lambda one: one["accuracy"], Axis("hidden tokens named", _share)),
        (
            "embedding",
            "order of retrieval",
            lambda one: one.get("order", one["cosine"]),
            Axis("agreement with dense retrieval"),
        ),
    ]
    prices = [
        ("cache_bytes", Axis("bytes of the cache", size, log=True, base=2)),
        ("seconds", Axis("seconds of a pass", lambda x: f"{x:g}", log=True)),
    ]
    for probe, word, read, axis in kinds:
        if probe not in probes:
            continue
        for key, price in prices:
            found = {
                name: (rows[-1][key], read(probes[probe]["candidates"][name]))
                for name, rows in costs.items()
                if key in rows[-1] and name in probes[probe]["candidates"]
            }
            if found:
                series = [letters.series(name, [at]) for name, at in found.items()]
                yield Figure(
                    f"{word} against {price.title}",
                    f"At {costs['dense'][-1]['length']:,} tokens. A pattern that has another one both to its left and on the better "
                    "side is beaten by it.",
                    points(
                        series,
                        price,
                        axis,
                        f"{word} against {price.title}, a point for each candidate",
                    ),
                )


def _by_position(edges: Sequence[int], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    return list(zip(middles, values, strict=True))


def _lines_by_position(found: Found, key: str, letters: Letters, title: str, text: str, axis: Axis) -> Iterator[Figure]:
    drawn = {name: one[key] for name, one in found["candidates"].items() if key in one}
    if drawn:
        series = [letters.series(name, _by_position(found["edges"], values)) for name, values in drawn.items()]
        yield Figure(title, text, lines(series, Axis("position in the text (tokens)", _whole), axis, title))


def _perplexity(found: Found, result: Found, letters: Letters) -> Iterator[Figure]:
    yield from _lines_by_position(
        found, "by_position", letters, "perplexity by position",
        "Where the lines part, the text has become longer than what a pattern sees of it.",
        Axis("perplexity", log=True),
    )  # fmt: skip


def _masked(found: Found, result: Found, letters: Letters) -> Iterator[Figure]:
    yield from _lines_by_position(
        found,
        "by_position",
        letters,
        "hidden tokens named, by position",
        "15 % of the tokens are hidden.",
        Axis("named", _share),
    )


def _divergence(found: Found, result: Found, letters: Letters) -> Iterator[Figure]:
    title, text = "KL to the dense answers, by position", "0 where the answers are those of dense attention."
    values = [value for one in found["candidates"].values() for value in one.get("kl_by_position", ()) if value]
    if values and max(values) > FACTORS * statistics.median(values):
        # one that goes far astray would press all others on the zero line
        text = f"{text} Below {LEAST_KL:g} nothing is drawn."
        shown = {
            name: {"kl_by_position": [value if (value or 0) >= LEAST_KL else None for value in one["kl_by_position"]]}
            for name, one in found["candidates"].items()
        }
        yield from _lines_by_position(
            {**found, "candidates": shown}, "kl_by_position", letters, title, text, Axis("KL (nats)", log=True)
        )
    else:
        yield from _lines_by_position(found, "kl_by_position", letters, title, text, Axis("KL (nats)", from_zero=True))
    yield from _lines_by_position(
        found,
        "same_by_position",
        letters,
        "same first answer as dense, by position",
        "The share of tokens.",
        Axis("same", _share),
    )
    series = [letters.series(name, list(enumerate(one["hidden_error"]))) for name, one in found["candidates"].items()]
    yield Figure(
        "error of states by layer",
        "How far states have moved from the dense ones, as a share of their length: it begins where the line leaves 0. "
        "Layer 0 are the embeddings.",
        lines(series, Axis("layer", _whole), Axis("error", from_zero=True), "error of states by layer"),
    )


def _coverage(found: Found, result: Found, letters: Letters) -> Iterator[Figure]:
    of_candidates, layers = found["candidates"], found["layers"]
    names = list(of_candidates)
    values = [of_candidates[name]["by_layer"] for name in names]
    yield Figure(
        "attention kept, by layer",
        "The share of the dense model's attention weights on pairs that a pattern holds. Pale layers lose most, and are the first to "
        "be kept dense.",
        heat_map(
            Grid([letters.letter(name) for name in names], [str(layer) for layer in layers], values, "", "layer", cell=(26, 24),
                 write=lambda x: f"{100 * x:.0f}"),
            "attention kept by each pattern in each layer",
        ),
        is_wide=True,
    )  # fmt: skip
    starts = [first for first, _ in found["distances"]]
    at = [(max(first, 0.5), value) for first, value in zip(starts, found["dense_by_distance"], strict=True)]
    write = Axis("distance (tokens, from)", _whole, log=True)
    series = [letters.series("dense", [(x, 100 * y) for x, y in at])]
    yield Figure(
        "where dense attention looks",
        "The share of its weights, by the distance between query and key.",
        lines(series, write, Axis("% of weights", from_zero=True), "attention weights by distance"),
    )
    series = [
        letters.series(name, [(x, value) for (x, _), value in zip(at, one["by_distance"], strict=True)])
        for name, one in of_candidates.items()
    ]
    yield Figure(
        "attention kept, by distance",
        "Of the weights at each distance, the share that a pattern holds.",
        lines(series, write, Axis("kept", _share, from_zero=True), "attention kept by distance"),
    )
    for name in names:
        rows = of_candidates[name]["by_head"]
        if any(value < 0.9995 for row in rows for value in row):
            heads = [str(head) for head in range(len(rows[0]))]
            turned = [[row[h] for row in rows] for h in range(len(heads))]
            yield Figure(
                f"{letters.letter(name)}: attention kept, by layer and head",
                f"Of {name}. Mean {of_candidates[name]['kept']:.1%}; heads that look far are pale.",
                heat_map(
                    Grid(heads, [str(layer) for layer in layers], turned, "head", "layer", cell=(13, 13)),
                    f"attention kept by {name} in each head of each layer",
                ),
            )


def _recall(found: Found, result: Found, letters: Letters) -> Iterator[Figure]:
    names = list(found["candidates"])
    tasks = list(found["candidates"]["dense"]["tasks"])

    def mean(cells: Sequence[Found]) -> float:
        return sum(cell["recalled"] for cell in cells) / len(cells)

    yield Figure(
        "facts recalled, by task",
        "Mean over lengths and depths. What the dense model does not recall either says nothing of a pattern.",
        heat_map(
            Grid(tasks, [letters.letter(name) for name in names],
                 [[mean(found["candidates"][name]["tasks"][task]) for name in names] for task in tasks], cell=(40, 22)),
            "facts recalled by each candidate in each task",
        ),
    )  # fmt: skip
    cells = {
        name: [cell for of_task in found["candidates"][name]["tasks"].values() for cell in of_task] for name in names
    }
    if not any(cell["depth"] is not None for cell in cells["dense"]):
        return

    def at(name: str, depth: float, lengths: Sequence[int]) -> float | None:
        own = [cell for cell in cells[name] if cell["depth"] == depth and cell["length"] in lengths]
        return mean(own) if own else None

    depths, lengths = found["depths"], found["lengths"]
    yield Figure(
        "facts recalled, by depth",
        "Mean over lengths and tasks. 0 % is the beginning of the text, farthest from the question.",
        heat_map(
            Grid([letters.letter(name) for name in names], [_share(depth) for depth in depths],
                 [[at(name, depth, lengths) for depth in depths] for name in names], cell=(66, 24)),
            "facts recalled by each candidate at each depth",
        ),
    )  # fmt: skip
    for name in names if len(lengths) > 1 else ():
        values = [[at(name, depth, [length]) for length in lengths] for depth in depths]
        yield Figure(
            f"{letters.letter(name)}: facts recalled, by length and depth",
            f"Of {name}, the mean over tasks whose facts have a depth.",
            heat_map(
                Grid([_share(depth) for depth in depths], [f"{length:,}" for length in lengths], values, "depth", "tokens",
                     cell=(66, 30)),
                f"facts recalled by {name} over lengths and depths",
            ),
        )  # fmt: skip


def _cost(found: Found, result: Found, letters: Letters) -> Iterator[Figure]:
    wanted = [
        ("seconds", Axis("seconds of a pass", lambda x: f"{x:g}", log=True)),
        ("seconds_per_token", Axis("ms per new token", lambda x: f"{1000 * x:g}", log=True)),
        ("cache_bytes", Axis("bytes of the cache", size, log=True, base=2)),
    ]
    for key, y in wanted:
        drawn = {
            name: [(row["length"], row[key]) for row in rows if row.get(key)]
            for name, rows in found["candidates"].items()
        }
        drawn = {name: at for name, at in drawn.items() if len(at) > 1}
        if drawn:
            axis = Axis("tokens", _whole, log=True, ticks=tuple(found["lengths"]))
            series = [letters.series(name, at) for name, at in drawn.items()]
            yield Figure(f"{y.title}, by length", "On this machine.", lines(series, axis, y, y.title))


DRAWN: dict[str, Callable[[Found, Found, Letters], Iterator[Figure]]] = {
    "recall": _recall,
    "perplexity": _perplexity,
    "masked": _masked,
    "divergence": _divergence,
    "coverage": _coverage,
    "cost": _cost,
}
