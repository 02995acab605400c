"""The command line: what it prints, and one clear line for a mistake."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sparse_hf
from sparse_hf.cli import app
from sparse_hf.show import describe, save_png
from tests.models.families import dense_model

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}


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


def test_convert_tells_and_writes_nothing(tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    options = ("--pattern", "window(63, 0)", "--max-length", "2048", "--rope", "linear", "--dry-run")
    done = run("convert", str(tmp_path / "dense"), str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    assert "layers 0-1: window(63, 0)" in done.stdout and "512 -> 2,048 tokens" in done.stdout
    assert "'rope_type': 'linear'" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_convert_grows_positions_as_asked(tmp_path):
    dense_model("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    options = ("--pattern", "window(63, 63)", "--max-length", "1024", "--positions", "interpolate")
    done = run("convert", str(tmp_path / "dense"), str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["positions"]["method"] == "interpolate" and report["max_length"] == [512, 1024]


def test_convert_refuses_an_unknown_way_to_grow(tmp_path):
    dense_model("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    options = ("--pattern", "first(1)", "--max-length", "1024", "--positions", "x")
    done = run("convert", str(tmp_path / "dense"), str(tmp_path / "out"), *options)
    assert done.returncode == 2 and "positions is 'x'" in done.stderr


def invoke(*arguments) -> str:
    """In this process, which is faster."""
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).stdout


def test_export_and_card(tmp_path):
    sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(63, 0)").save_pretrained(tmp_path / "sparse")
    for to, model_type in (("dense", "llama"), ("native", "mistral")):
        assert "without sparse_hf" in invoke("export", tmp_path / "sparse", tmp_path / to, "--to", to)
        assert json.loads((tmp_path / to / "config.json").read_text())["model_type"] == model_type
    invoke("card", tmp_path / "sparse", "--base", "owner/model")
    assert "base_model: owner/model" in (tmp_path / "sparse" / "README.md").read_text()
    with pytest.raises(FileExistsError, match="--overwrite"):
        invoke("card", tmp_path / "sparse")
    invoke("card", tmp_path / "sparse", "--base", "owner/other", "--overwrite")
    assert "base_model: owner/other" in (tmp_path / "sparse" / "README.md").read_text()


def test_list_names_every_family():
    text = invoke("list")
    assert all(name in text for name in sparse_hf.FAMILIES) and "NextSentencePrediction" in text and "…" not in text
    rows = {row["family"]: row for row in json.loads(invoke("list", "--json"))}
    assert set(rows) == set(sparse_hf.FAMILIES) and "SparseT5EncoderModel" in rows["t5"]["heads"]
    assert rows["bart"]["positions"] == "learned" and rows["llama"]["conversion"] == "limit raised; scaled with --rope"


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


def test_bench_compares_models_before_it_times_them(tmp_path, monkeypatch):
    from sparse_hf.bench import cases, models

    # 2 heads are enough to see that all of it works
    small = dataclasses.replace(cases.CASES["bert"], config=lambda n, k: {**cases._encoder(n, k), **SMALL})
    monkeypatch.setitem(cases.CASES, "bert", small)
    result = models.run_models(["bert"], [256, 512], layers=1, device="cpu", out=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert [row["name"] for row in result["rows"]] == ["bert, transformers", "bert, sparse_hf"] * 2
    assert all(row["step_s"] > 0 for row in result["rows"]) and result["errors"]["bert"]["gradient"] < 1e-4
    # another pattern than the one that Transformers is given
    wrong = dataclasses.replace(small, same=lambda config, n: {"layers": {0: "window(9, 9)"}})
    monkeypatch.setitem(cases.CASES, "bert", wrong)
    with pytest.raises(AssertionError, match="BertModel: output is off by"):
        models.run_models(["bert"], [256], layers=1, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "windw(1, 2)"], "unknown word 'windw'"),
        (["show", "window(1, 2)", "--length", "0"], "length is 0"),
        (["show", "marked()", "--marked", "x"], "'x' is not a whole number"),
        (["show", "first(1)", "--png", "/nowhere/p.png"], "is no folder; make it first"),
        (["convert", "/nowhere", "out", "--pattern", "first(1)"], "is no folder with a checkpoint"),
        (["export", "/nowhere", "out", "--to", "dense"], "is no folder with a checkpoint"),
        (["export", "/nowhere", "out", "--to", "gguf"], "to is 'gguf'; it must be 'dense' or 'native'"),
        (["card", "/nowhere"], "/nowhere has no config.json"),
        (["bench", "attention", "--dtype", "fp8"], "dtype is 'fp8'"),
        (["bench", "models", "--models", "gpt5"], r"unknown models ['gpt5']; the known ones are bert, longformer"),
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
