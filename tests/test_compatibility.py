"""The page on compatibility names versions that are installed, tests that exist, and every finding."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.processes import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
FINDINGS = sorted((ROOT / "findings").glob("*.sh"))
CONSTRAINTS = ("constraints.txt", "constraints-oldest.txt")
# what every user of an extra meets
EXPECTED = {
    "torch", "transformers", "safetensors", "accelerate", "datasets", "evaluate", "peft", "gguf", "sentence-transformers", "triton",
    "flash-attn-4",
}  # fmt: skip


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    lines = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def versions(cell: str) -> dict[str, list[str]]:
    """Libraries of a cell, each with the versions behind its name."""
    found = re.findall(r"([a-z][\w-]*) ((?:\d[\w.]*(?:, )?)+)", cell)
    return {name: numbers.strip(", ").split(", ") for name, numbers in found}


def constraint(file: str) -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / file).read_text().split())


LIBRARIES, SURPRISES = rows("Libraries"), rows("Findings")


def test_versions_are_those_that_tests_run_with():
    wanted = [constraint(file) for file in CONSTRAINTS]
    named = [versions(cells[0]) for cells in LIBRARIES]
    assert all(named) and {name for row in named for name in row} >= EXPECTED
    first = {name: numbers for row in reversed(named) for name, numbers in row.items()}
    for name, numbers in first.items():
        if name in wanted[0]:
            assert numbers == list(dict.fromkeys(one[name] for one in wanted)), name


@pytest.mark.parametrize("cells", LIBRARIES + SURPRISES, ids=lambda cells: cells[0].partition("]")[0].lstrip("["))
def test_tests_speak_of_their_library(cells):
    tests = re.findall(r"`(tests/[\w/]+\.py)`", cells[-1])
    assert tests or "by hand" in cells[1]
    assert all((ROOT / test).is_file() for test in tests)


def test_every_finding_is_on_the_page_and_goes_with_a_line():
    linked = [Path(re.search(r"\(\.\./(findings/\w+\.sh)\)", cells[0])[1]) for cells in SURPRISES]
    assert sorted(ROOT / path for path in linked) == FINDINGS
    names = {name for cells in LIBRARIES for name in versions(cells[0])}
    assert all(cells[1] in names for cells in SURPRISES)


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_is_a_script_with_pinned_packages(path):
    text = path.read_text()
    assert text.startswith("#!/bin/sh\n# ") and path.stat().st_mode & 0o100
    assert "Fails if this changes." in text and "sparse_hf" not in text
    pinned = [word for line in re.findall(r'/pip" install -q (.+)', text) for word in line.split()]
    assert pinned and all("==" in word for word in pinned)
    code = re.search(r"<<'PY'\n(.*?)^PY$", text, re.M | re.S)[1]
    assert ast.parse(code).body and "as described" in code
