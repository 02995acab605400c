"""Committed results say where and when they were made; references to them exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparse_hf.bench.results import machine_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
FILES = sorted(RESULTS.rglob("*.json"))
# prose and code that speak of results: pages, cards, examples
SPEAKERS = [
    path
    for pattern in ("*.md", "Makefile", "docs/**/*.md", "examples/**/*.py", "model_cards/*.md", "sparse_hf/**/*.py")
    for path in ROOT.glob(pattern)
]
# `h200/2026-11-27-models.json`, or several at once: `h200/2026-11-27-models-batch-*.json`
REFERENCE = re.compile(r"([\w-]+/[\d*]{1,4}[\w*-]*-[\w*-]+\.(?:json|png))")


def name_of(path: Path) -> str:
    return path.relative_to(RESULTS).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_result_is_named_by_its_machine_and_its_date(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("entries", {}).values()
    found = [part["environment"] for part in (content, *rows) if "environment" in part]
    # rows that were added to a study later have dates, and perhaps machines, of their own
    assert path.parent.name in {machine_name(each["hardware"]) for each in found}
    first = min(each["date"] for each in found)
    assert re.fullmatch(rf"{first}-[a-z0-9]+(-[a-z0-9]+)*\.json", path.name)


def test_every_picture_stands_beside_its_figures():
    assert {path.with_suffix(".json") for path in (*RESULTS.rglob("*.png"), *RESULTS.rglob("*.html"))} <= set(FILES)


def test_nothing_else_is_there():
    others = {path for path in RESULTS.rglob("*") if path.is_file() and path.suffix not in (".json", ".png", ".html")}
    assert others == {RESULTS / "README.md"} and all(path.parent.parent == RESULTS for path in FILES)


def test_every_reference_to_a_result_exists():
    wanted = {(path, name) for path in SPEAKERS for name in REFERENCE.findall(path.read_text(encoding="utf-8"))}
    missing = [(path.name, name) for path, name in wanted if not any(RESULTS.glob(name))]
    assert not missing and len(wanted) > len(FILES)


def test_the_index_names_every_result():
    linked = re.findall(r"\]\(([\w/-]+\.json)\)", (RESULTS / "README.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(map(name_of, FILES))
