"""What an evaluation found: figures, a table, a report."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..bench import write_json
from .candidates import DENSE
from .pieces import Found
from .report.html import page
from .report.table import COLUMNS, summary_tables, verdict_lines

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

    def card_results(self, candidate: str) -> Found:
        """A candidate's figures beside the dense ones, as `results.json` has them, from which a model card is written.

        Raises:
            ValueError: no candidate of this name.

        Example: `write_json(found.card_results("sinks"), "my-sparse-llama/results.json")`.
        """
        names = [one["name"] for one in self.result["candidates"][1:]]
        if candidate not in names:
            raise ValueError(f"no candidate is named {candidate!r}; there are {', '.join(names)}")
        texts, settings = list(dict.fromkeys(text["name"] for text in self.result["texts"])), self.result["settings"]
        verdict = next(one["verdict"] for one in self.result["verdicts"] if one["candidate"] == candidate)
        figures: Found = {
            "note": f"`sparse-hf evaluate`, {settings['length']:,} tokens of each text: {', '.join(texts)}. Verdict: {verdict}.",
            "dataset": ", ".join(texts),
        }
        for column in COLUMNS:
            of_probe = self.result["probes"].get(column.probe, {}).get("candidates", {})
            values = {"sparse": of_probe.get(candidate), "dense": of_probe.get(DENSE)}
            read = {name: column.read(one) for name, one in values.items() if one is not None}
            # seconds and bytes are those of a machine
            if column.probe != "cost" and read.get("sparse") is not None:
                figures[column.title] = read
        return figures

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html` into a folder; gives the path of the page."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self.result, folder / JSON)
        (folder / HTML).write_text(self.html(), encoding="utf-8")
        return folder / HTML
