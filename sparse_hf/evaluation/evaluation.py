"""What an evaluation found: figures, a table, a report."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..bench import write_json
from .pieces import Found
from .report.html import page
from .report.table import summary_tables, verdict_lines

JSON, HTML = "report.json", "report.html"
# columns of a printed table
WIDTH = 100


def as_text(show: Callable[[Console], None]) -> str:
    """What `show` prints to a console, as text."""
    file = io.StringIO()
    show(Console(file=file, width=WIDTH))
    return file.getvalue()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found. `result` holds all figures, as JSON has them: see docs/how-to/evaluate.md for its keys.

    `print(it)` gives a table with a line for each candidate, and the verdicts.
    """

    result: Found

    def __str__(self) -> str:
        return as_text(self.print)

    def print(self, console: Console) -> None:
        """Print the table and the verdicts."""
        for table in summary_tables(self.result):
            console.print(table)
        for line in verdict_lines(self.result):
            console.print(line, highlight=False, soft_wrap=False)

    def html(self) -> str:
        """The report as one page of HTML with its pictures, which needs nothing beside it."""
        return page(self.result)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html` into a folder; gives the path of the page."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self.result, folder / JSON)
        (folder / HTML).write_text(self.html(), encoding="utf-8")
        return folder / HTML
