"""The command line: what it prints, and one clear line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_hf.show import describe, save_png
from tests.models.families import dense_model


def run(*arguments: str):
    command = [sys.executable, "-W", "ignore", "-m", "sparse_hf.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_show_prints_a_picture_and_numbers(tmp_path):
    done = run("show", "window(256,256) | first(1)", "--length", "4096", "--png", str(tmp_path / "p.png"))
    assert done.returncode == 0, done.stderr
    assert "window(256, 256) | first(1)" in done.stdout and "2,043,134 (12.178%)" in done.stdout and "█" in done.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_convert_writes_a_folder(tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    out = str(tmp_path / "out")
    done = run("convert", str(tmp_path / "dense"), out, "--pattern", "sliding_window(64)", "--layers", "0=dense")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sparse_attention"]["layers"] == ["dense", "sparse"]
    again = run("convert", str(tmp_path / "dense"), out, "--pattern", "sliding_window(64)")
    assert again.returncode == 2 and "error:" in again.stderr and "is not empty" in again.stderr


def test_bench_writes_figures_with_versions(tmp_path):
    done = run(
        "bench",
        "attention",
        "--lengths",
        "256,512",
        "--heads",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "r.json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert {r["name"] for r in result["rows"]} == {"blockwise", "sdpa_dense"} and result["environment"]["versions"][
        "torch"
    ]
    assert all(r["relative_error"] < 1e-5 for r in result["rows"] if r["name"] == "blockwise")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "windw(1, 2)"], "unknown word 'windw'"),
        (["show", "window(1, 2)", "--length", "0"], "length is 0"),
        (["show", "marked()", "--marked", "x"], "'x' is not a whole number"),
        (["show", "first(1)", "--png", "/nowhere/p.png"], "is no folder; make it first"),
        (["convert", "/nowhere", "out", "--pattern", "first(1)"], "is no folder with a checkpoint"),
        (["bench", "attention", "--dtype", "fp8"], "dtype is 'fp8'"),
        (["bench", "attention", "--backends", "x"], r"unknown backends ['x']"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("pattern", "length", "pairs", "layers"),
    [
        ("window(None, None)", 100, 10_000, 1),
        ("window(None, 0)", 100, 5050, 1),
        ("window(1, 1)", 10, 28, 9),
        ("window(1, 1) | first(1)", 10, 44, 2),
        ("sparse_transformer(stride=10, mode='strided')", 100, None, 2),
        ("sparse_transformer(stride=10, mode='fixed', summary=2)", 100, None, 2),
        ("chunk(5)", 20, 100, None),
    ],
)
def test_description_counts_right(pattern, length, pairs, layers):
    facts = describe(pattern, length)
    assert facts.layers_to_reach == layers
    if pairs is not None:
        assert facts.pairs == pairs and facts.density == pytest.approx(pairs / length**2)
        assert facts.flops_forward == 4 * 12 * 64 * pairs


def test_png_of_heads_and_marks(tmp_path):
    path = save_png("per_head(window(9, 9) | marked(), stride(4))", 300, tmp_path / "p.png", marked=(7,))
    assert path.stat().st_size > 5000 and [p.name for p in tmp_path.iterdir()] == ["p.png"]
