"""Numbers of layers in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..pattern import full
from .candidates import DENSE


def layer_ranges(layers: Sequence[str]) -> list[tuple[str, str]]:
    """The patterns of layers, each with the layers that have it: `[("0-29", "window(255, 0)")]`."""
    found: dict[str, list[int]] = {}
    for layer, text in enumerate(layers):
        found.setdefault(text, []).append(layer)
    return [(", ".join(_runs(of_text)), text) for text, of_text in found.items()]


def dense_layers(numbers: Iterable[int]) -> str:
    """What `layers` says to keep these dense: "0-2=dense, 5=dense"."""
    return ", ".join(f"{run}=dense" for run in _runs(sorted(set(numbers))))


def layers_text(texts: Sequence[str], others: Sequence[str]) -> str:
    """What `layers` says for these patterns of layers; `others` are those that layers have without a word."""
    dense = str(full())
    named = [text if text != other else "" for text, other in zip(texts, others, strict=True)]
    entries = [
        (run, DENSE if text == dense else text)
        for runs, text in layer_ranges(named)
        if text
        for run in runs.split(", ")
    ]
    return ", ".join(
        f"{run}={text}" for run, text in sorted(entries, key=lambda entry: int(entry[0].partition("-")[0]))
    )


def _runs(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers as ranges of neighbours."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
