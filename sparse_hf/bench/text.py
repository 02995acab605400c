"""Figures as people read them, in tables that fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console

from .plot import readable
from .results import Result


@dataclass
class Figures:
    """A table of figures, in groups with a heading each, and notes below it.

    Args:
        title: what was measured.
        columns: headings; the first is that of the names.
    """

    title: str
    columns: Sequence[str]
    notes: list[str] = field(default_factory=list)
    _groups: dict[str, list[Sequence[str]]] = field(default_factory=dict)

    def add(self, group: str, name: str, *cells: str) -> None:
        """A row of a group; a column whose cells are all empty is left out."""
        self._groups.setdefault(group, []).append((name, *cells))

    def fail(self, group: str, name: str, reason: str) -> None:
        """A row without figures, whose reason stands below the table, where there is room for it."""
        self.add(group, name, "failed")
        self.notes.append(f"{name}, {group}: {reason}")

    def print(self, console: Console) -> None:
        """Print the table; where names and figures do not stand beside each other, figures stand below."""
        write = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        rows = [row for group in self._groups.values() for row in group]
        columns = [c for c in range(1, len(self.columns)) if any(len(row) > c and row[c] for row in rows)]
        widths = {c: max(len(self.columns[c]), *(len(row[c]) for row in rows if len(row) > c)) for c in columns}
        name = max((len(row[0]) for row in rows), default=0)
        beside = name + sum(widths.values()) + len(widths) <= console.width
        apart = 2 if beside and name + sum(widths.values()) + 2 * len(widths) <= console.width else 1

        def line(cells: Sequence[str]) -> str:
            shown = ((cells[c] if c < len(cells) else "").rjust(widths[c]) for c in columns)
            return (cells[0].ljust(name if beside else 0) + "".join(" " * apart + each for each in shown)).rstrip()

        console.print(self.title, style="bold", highlight=False, markup=False)
        write(line(("", *self.columns[1:])))
        for group, members in self._groups.items():
            write(group, style="bold")
            for row in members:
                if not beside:
                    write(row[0])
                write(line(row if beside else ("", *row[1:])))
        for note in self.notes:
            console.print(note, highlight=False, markup=False)


def exponents(result: Result, *keys: str) -> list[str]:
    """A line on how time grows with the tokens, by the first of the keys that a row has; none where nothing grew."""
    fits = {name: next((fit[key] for key in keys if fit.get(key)), None) for name, fit in result["slopes"].items()}
    called = {row["name"]: readable(row) for row in result["rows"]}
    known = [(called[name], fit) for name, fit in fits.items() if fit is not None]
    return [f"time grows with the tokens to the power of: {joined(known)}"] if known else []


def joined(values: Iterable[tuple[str, float]]) -> str:
    """Names with a number each: "a 1.02, b 0.98"."""
    return ", ".join(f"{name} {value:.2f}" for name, value in values)
