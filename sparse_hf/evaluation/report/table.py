"""The table of an evaluation, and its verdicts, for terminals and pages alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from ...units import size
from ..pieces import Found


@dataclass(frozen=True)
class Column:
    """A figure of each candidate: its heading, and how it is read and written."""

    title: str
    probe: str
    read: Callable[[Any], Any]
    write: Callable[[Any], str]


def _cost(key: str) -> Callable[[Any], Any]:
    """A figure at the greatest length."""
    return lambda rows: rows[-1].get(key)


COLUMNS = (
    Column("perplexity", "perplexity", lambda one: one["perplexity"], lambda x: f"{x:.2f}"),
    Column("LongPPL", "longppl", lambda one: one["perplexity"], lambda x: f"{x:.2f}"),
    Column("named", "masked", lambda one: one["accuracy"], lambda x: f"{x:.1%}"),
    Column("cosine", "embedding", lambda one: one["cosine"], lambda x: f"{x:.3f}"),
    Column("found", "embedding", lambda one: one.get("found"), lambda x: f"{x:.0%}"),
    Column("KL", "divergence", lambda one: one.get("kl"), lambda x: f"{x:.3f}"),
    Column("same", "divergence", lambda one: one.get("same"), lambda x: f"{x:.1%}"),
    Column("error", "divergence", lambda one: one["hidden_error"][-1], lambda x: f"{x:.3f}"),
    Column("kept", "coverage", lambda one: one["kept"], lambda x: f"{x:.1%}"),
    Column("recall", "recall", lambda one: one["recalled"], lambda x: f"{x:.0%}"),
    Column("answer loss", "recall", lambda one: one["loss"], lambda x: f"{x:.2f}"),
    Column("harness", "harness", lambda one: one["score"], lambda x: f"{x:.1%}"),
    Column("s per pass", "cost", _cost("seconds"), lambda x: f"{x:.2f}"),
    Column("ms per token", "cost", _cost("seconds_per_token"), lambda x: f"{x * 1000:.1f}"),
    Column("cache", "cost", _cost("cache_bytes"), lambda x: size(x)),
    Column("peak", "cost", _cost("peak_bytes"), lambda x: size(x)),
)


def rows(result: Found, columns: Sequence[Column] = COLUMNS) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for each candidate; figures that were not measured have no column."""
    found = [
        (column, result["probes"][column.probe]["candidates"]) for column in columns if column.probe in result["probes"]
    ]
    names = [one["name"] for one in result["candidates"]]
    # rows that only one probe has come last
    names = list(dict.fromkeys([*names, *(name for _, of_probe in found for name in of_probe)]))
    values = {name: [_value(column, of_probe.get(name)) for column, of_probe in found] for name in names}
    some = [i for i in range(len(found)) if any(of_name[i] is not None for of_name in values.values())]
    written = [[name, *("" if v[i] is None else found[i][0].write(v[i]) for i in some)] for name, v in values.items()]
    return ["", *(found[i][0].title for i in some)], written


def _value(column: Column, of_name: Found | None) -> Any:
    return None if of_name is None else column.read(of_name)


def summary_tables(result: Found) -> Iterator[Table]:
    """The figures of quality, then those of cost: narrow enough for a terminal of 80 columns."""
    settings, costs = result["settings"], [column for column in COLUMNS if column.probe == "cost"]
    quality = [column for column in COLUMNS if column not in costs]
    for columns, length in ((quality, settings["length"]), (costs, max(settings["lengths"]))):
        headings, written = rows(result, columns)
        if len(headings) == 1:
            continue
        title = f"{result['model']['name']}, {length:,} tokens"
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1), title=title, title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading), overflow="fold")
        for row in written:
            table.add_row(*map(escape, row))
        yield table


def verdict_lines(result: Found) -> Iterator[RenderableType]:
    """The verdicts as lines of text; what does not fit goes on below, indented."""
    for one in result["verdicts"]:
        yield escape(f"{one['candidate']}: {one['verdict']}")
        for line in (*one["reasons"], *([one["cannot_hear"]] if one["cannot_hear"] else []), *one["remedies"]):
            yield _hanging("  - ", line)
    if result["left_out"]:
        yield ""
        for name, reason in result["left_out"].items():
            yield _hanging("not asked: ", f"{name}, since {reason}")


def _hanging(mark: str, text: str) -> Table:
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(mark, escape(text))
    return grid
