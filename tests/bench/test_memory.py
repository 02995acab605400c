"""`bench memory`: gradients are compared before anything is timed, and every way has its row."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparse_hf.bench import LongSteps, memory, run_memory
from sparse_hf.cli import app


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(memory, "COMPARED_TOKENS", 64)
    monkeypatch.setattr(memory, "COMPARED_PIECE", 16)


def test_every_way_is_compared_timed_and_drawn(tmp_path):
    asked = ["--cases", "tiny:256,tiny-bert:256", "--ways", "plain,checkpointing,long_text,offload", "--steps", "1"]
    out = tmp_path / "r.json"
    given = ["bench", "memory", *asked, "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0 and max(map(len, done.stdout.splitlines())) <= 80, done.stdout
    result = json.loads(out.read_text())
    for found in result["compared"].values():
        assert found["gradient_distance"] < 1e-5 and found["loss"] == pytest.approx(found["loss_plain"], rel=1e-5)
    rows = result["rows"]
    assert len(rows) == 8 and not [row for row in rows if row.get("failed")]
    losses = {row["shape"]: row["loss"] for row in rows}
    assert all(row["loss"] == pytest.approx(losses[row["shape"]], rel=1e-4) for row in rows)
    assert all(row["planned_bytes"] > 0 and row["seconds"] > 0 for row in rows)
    assert all(("times_the_time" in row) == (row["way"] in ("long_text", "offload")) for row in rows)
    assert out.with_suffix(".png").stat().st_size > 5000


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(memory, "EXACT_DISTANCE", 0.0)
    result = run_memory(LongSteps((("tiny", 64),), ("plain", "long_text"), steps=0), "cpu")
    plain, ours = result["rows"]
    assert "failed" not in plain and ours["failed"].startswith("wrong: gradients are")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cases": (("2b", 64),)}, "shape is '2b'"),
        ({"cases": (("tiny", 1),)}, "has 1 tokens"),
        ({"ways": ("fast",)}, r"unknown ways \['fast'\]"),
        ({"cases": ()}, "one case is needed"),
        ({"steps": -1}, "steps is -1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_refusals_name_the_value(given, message):
    with pytest.raises(ValueError, match=message):
        LongSteps(**{"cases": (("tiny", 64),), **given})
