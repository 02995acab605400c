"""What commands print fits a terminal: every table and every paragraph, at 80 and at 120 columns."""

from __future__ import annotations

import importlib
import json
import logging
from io import StringIO

import pytest
from rich.console import Console

import sparse_hf
from sparse_hf.analysis import render, render_stack
from sparse_hf.cli.paragraphs import print_hanging, wrap_warnings
from sparse_hf.evaluation.report.table import summary_tables, verdict_lines
from tests.crosses import sampled
from tests.models.families import dense_model
from tests.processes import ROOT
from tests.test_front_door import invoke

WIDTHS = (80, 120)
RESULTS = ROOT / "docs" / "results"
# a file of results for each benchmark, of many rows and of long names
BENCHES = {
    "attention": "h200/2026-11-27-attention-window.json",
    "models": "h200/2026-11-27-models-compiled.json",
    "generate": "h200/2026-11-30-generate.json",
}
PATTERNS = (
    "window(256, 256) | first(1)",
    "per_head(window(9, 9) | marked(), stride(64), chunk(128) & causal())",
    "lsh(64, 2)",
    "bigbird(64, 3)",
    "window(63, 0) & stride(4) | first(4) | stride(128)",
)


def printed(width: int, *what: object) -> list[str]:
    console = Console(file=(file := StringIO()), width=width, force_terminal=False)
    for one in what:
        console.print(one)
    return file.getvalue().splitlines()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense decoder, and a sparse one that has something of everything to say."""
    place = tmp_path_factory.mktemp("folders")
    dense = dense_model("LlamaForCausalLM")
    dense.save_pretrained(place / "dense")
    sparse_hf.sparsify(dense, "window(20, 0)", layers="1=window(9, 0) | marked()").save_pretrained(place / "sparse")
    return place


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_show_fits(pattern, width):
    assert max(map(len, printed(width, render(pattern, 1024)))) <= width
    assert max(map(len, printed(width, render_stack([pattern, "first(1)"], 1024)))) <= width


def test_names_of_numbers_stand_on_one_line():
    lines = printed(80, render("window(256, 256) | first(1)", 65536))
    assert not [line for line in lines if line.startswith("│  ")]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("list", "bert"),
        ("list", "jamba"),
        ("info", "sparse", "--length", "1000"),
        ("show", "sparse", "--length", "100"),
        ("convert", "dense", "out", "--pattern", "window(20, 0)", "--max-length", "1024", "--dry-run"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands_fit(arguments, width, folders, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = invoke(*arguments).splitlines()
    assert lines and max(map(len, lines)) <= width


@pytest.mark.parametrize(
    ("text", "indent", "lines"),
    [
        ("to a greater length: none", 2, ["to a greater length:", "  none"]),
        ("  0-1  window(127, 0)  (3%)", 4, ["  0-1  window(127, 0)", "    (3%)"]),
        ("name  " + "x" * 30, 6, ["name", "      " + "x" * 30]),
        ("", 2, [""]),
    ],
)
def test_what_does_not_fit_goes_on_below(text, indent, lines):
    console = Console(file=(file := StringIO()), width=22)
    print_hanging(console, text, indent)
    assert file.getvalue().splitlines() == lines


@pytest.mark.parametrize("is_terminal", [True, False])
def test_warnings_go_on_below_on_a_terminal(is_terminal, monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: is_terminal))
    monkeypatch.setenv("COLUMNS", "28")
    wrap_warnings()
    last = logging.lastResort
    assert last is not None
    warning = logging.LogRecord(
        "x", logging.WARNING, "x", 1, "a %s of layers='0-/4=dense' and more", ("pattern",), None
    )
    right = "a pattern of\n  layers='0-/4=dense' and\n  more" if is_terminal else warning.getMessage()
    assert last.format(warning) == right


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", BENCHES)
def test_tables_of_benchmarks_fit(name, width):
    """Rows; a note below them, which is one sentence, goes on below."""
    result = json.loads((RESULTS / BENCHES[name]).read_text())
    table = importlib.import_module(f"sparse_hf.bench.{name}")._table(result)
    console = Console(file=(file := StringIO()), width=width)
    table.print(console)
    assert max(map(len, file.getvalue().splitlines())) <= width


@pytest.mark.parametrize("width", sampled(WIDTHS[:1], WIDTHS))
def test_the_table_of_plans_fits(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = invoke("bench", "plan", "bigbird() & causal() | stride(512)", "--lengths", "500,1000", "--device", "cpu")
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_an_evaluation_fits(width):
    result = json.loads((RESULTS / "cpu-2-cores" / "2026-11-30-evaluate-smollm2.json").read_text())
    assert max(map(len, printed(width, *summary_tables(result), *verdict_lines(result)))) <= width
    # below a mark only what goes on is as far in as its text
    marks = ("  - ", "    ", "not asked: ")
    lines = [line for line in printed(width, *verdict_lines(result)) if line and not line.startswith(marks)]
    assert lines == [f"{one['candidate']}: {one['verdict']}" for one in result["verdicts"]]
