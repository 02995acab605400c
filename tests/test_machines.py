"""No test depends on how fast the machine is that runs it."""

from __future__ import annotations

import ast

from tests.processes import ROOT

CLOCKS = {"monotonic", "perf_counter", "process_time", "time"}


def reads_a_clock(node: ast.AST) -> bool:
    """Is a function of the module `time` called in it?"""
    calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
    attributes = (name for name in calls if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name))
    return any(name.value.id == "time" and name.attr in CLOCKS for name in attributes)


def test_nothing_is_asserted_of_a_clock():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and reads_a_clock(node)
    ]
    assert not found, "these assert how long something takes, and a loaded machine takes longer"


def test_a_clock_is_noticed():
    assert reads_a_clock(ast.parse("assert time.monotonic() - began < 30"))
    assert not reads_a_clock(ast.parse("assert path.stat().st_mtime < before"))
