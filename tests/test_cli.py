"""The command line: what it prints, and one clear line for a mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparse_hf
from sparse_hf.analysis import describe, save_png
from sparse_hf.cli import app, main
from sparse_hf.models.dense_families import DENSE_FAMILIES, INDEXED_FAMILIES
from sparse_hf.models.hf.auto_classes import head_names
from tests.models.families import dense_model

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}


def run_apart(*arguments: str):
    command = [sys.executable, "-W", "ignore", "-m", "sparse_hf", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def run(*arguments: str):
    """As `run_apart`, in this process, which has imported everything already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["sparse-hf", *arguments])
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_show_prints_a_picture_and_numbers(tmp_path):
    done = run_apart("show", "window(256,256) | first(1)", "--length", "4096", "--png", str(tmp_path / "p.png"))
    assert done.returncode == 0, done.stderr
    assert "window(256, 256) | first(1)" in done.stdout and "2,043,134 (12.178%)" in done.stdout and "█" in done.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_show_draws_what_a_decoder_computes(tmp_path):
    pattern = "window(9, 9) | first(4)"
    cut = run("show", pattern, "--length", "200", "--causal")
    # four tokens see their past, the others sinks too, as far as the window does not hold them
    assert (
        "1,984 (" not in cut.stdout
        and f"{sum(min(q + 1, 10) + min(4, max(0, q - 9)) for q in range(200)):,} (" in cut.stdout
    )
    assert "to every earlier token" in cut.stdout and "│ up to 200 │" in cut.stdout and "│    20,100 │" in cut.stdout
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    assert run("convert", str(tmp_path / "dense"), str(tmp_path / "out"), "--pattern", pattern).returncode == 0
    drawn = run("show", str(tmp_path / "out"), "--length", "200")
    table = cut.stdout[cut.stdout.index("queries downward") : cut.stdout.index("FLOPs")]
    assert table in drawn.stdout
    heads, width = dense_model("LlamaForCausalLM").config.num_attention_heads, 8
    assert json.loads(run("show", str(tmp_path / "out"), "--json").stdout)["num_heads"] == heads
    assert describe(pattern, 200, num_heads=heads, head_dim=width, is_causal=True).dense_kept_bytes == 4 * heads * 200


@pytest.mark.parametrize("options", [(), ("--causal",)])
@pytest.mark.parametrize("length", ["512", "65536"])
def test_the_table_of_show_fits_80_columns(length, options):
    shown = run("show", "window(255, 0) | first(4)", "--length", length, *options).stdout
    labels = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert "kept beside q, k, v, out" in labels and all(len(line) <= 80 for line in shown.splitlines())
    # nothing but the reach goes on in a second line
    assert labels.count("") <= 1


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
    verified = {name for name, family in sparse_hf.FAMILIES.items() if family.verified}
    assert all(name in text for name in verified) and "NextSentencePrediction" in text and "…" not in text
    rows = {row["family"]: row for row in json.loads(invoke("list", "--json"))}
    assert {name for name, row in rows.items() if row["kind"] == "verified"} == verified
    assert {name for name, row in rows.items() if row["kind"] == "derived"} == set(
        sparse_hf.derived_types()
    ) and "SparseT5EncoderModel" in rows["t5"]["heads"]
    # families of the table are listed by the names that Transformers has for their classes, unless they were derived before
    for entry in (*DENSE_FAMILIES, *INDEXED_FAMILIES):
        family = sparse_hf.FAMILIES[entry.dense_type]
        assert head_names(entry.dense_type, entry.prefix) == [c.__name__ for c in family.classes]
        assert entry.sparse_type == family.sparse_type and entry.positions == family.positions
    assert rows["bart"]["positions"] == "learned" and rows["llama"]["conversion"] == "limit raised; scaled with --rope"


@pytest.mark.parametrize(
    ("pattern", "peers"),
    [
        ("stride(7)", {"sdpa_dense"}),
        # of windows FlexAttention, which is compiled for half a minute, where there is a C++
        # compiler
        pytest.param("window(40, 0)", {"sdpa_dense", "flex_attention"}, marks=pytest.mark.slow),
    ],
)
def test_bench_writes_figures_with_versions(pattern, peers, tmp_path):
    lengths = ["--lengths", "256,512", "--heads", "2", "--device", "cpu"]
    done = run("bench", "attention", "--pattern", pattern, *lengths, "--out", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert {r["name"] for r in result["rows"]} == {"blockwise", *peers} and result["environment"]["versions"]["torch"]
    assert all(r["relative_error"] < 1e-5 for r in result["rows"] if r["name"] == "blockwise")
    assert all((r["step_s"] is None) == (r["name"] == "flex_attention") for r in result["rows"])


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


@pytest.fixture
def no_sweep(monkeypatch):
    # before memory is measured; over all that a session of tests holds it takes a quarter of a
    # second each time
    monkeypatch.setattr("sparse_hf.bench.measure.gc.collect", lambda: 0)


def test_bench_plan_compares_tables_before_it_times_them(tmp_path, monkeypatch, no_sweep):
    from sparse_hf.bench import plan

    pattern, out, png = "window(100, 0) | first(4) & causal()", tmp_path / "r.json", tmp_path / "r.png"
    text = invoke("bench", "plan", pattern, "--lengths", "200,1000", "--device", "cpu", "--out", out, "--plot", png)
    rows = json.loads(out.read_text())["rows"]
    assert [(r["n"], r["kind"]) for r in rows] == [(n, kind) for n in (200, 1000) for kind in ("blocks", "tiles")]
    # 8 query blocks of 128: the first key block, and from the third block on also the own and the
    # one before
    assert rows[2]["entries"] == 1 + 2 + 6 * 3 and rows[2]["table_bytes"] == 9 * 8 + 21 * (4 + 1)
    assert all(row["build_s"] > 0 for row in rows) and "goal at 1,048,576" in text and png.stat().st_size > 5000
    # tables that take partial tiles for full ones, by query or by key, and memory that is not there
    tiles = plan.MAKERS["tiles"]
    for side, what in (("by_query", "query"), ("by_key", "key")):
        monkeypatch.setitem(plan.MAKERS, "tiles", partial(_without_masks, tiles, side))
        with pytest.raises(AssertionError, match=rf"of {what} \d+ the tiles hold"):
            plan.run_plan([pattern], [1000], device="cpu")
    monkeypatch.setitem(plan.MAKERS, "tiles", lambda made: torch.empty(1 << 50))
    result = plan.run_plan([pattern], [200, 1000], device="cpu")
    assert [row.get("failed") for row in result["rows"]] == [None, "out of memory"] * 2


def _without_masks(tiles, side, made):
    found = tiles(made)
    lists = getattr(found, side)
    without = dataclasses.replace(lists, masked=torch.zeros_like(lists.masked))
    given = {"by_query": without} if side == "by_query" else {"make_by_key": lambda: without}
    return dataclasses.replace(found, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "first(1)", "--lengths", "0"], "lengths holds 0; a plan needs at least 1 token"),
        (["plan", "lsh(64, 2)"], "there is no plan of it before they are known"),
        (["generate", "--pattern", "windw(1, 2)"], "unknown word 'windw'"),
        (["generate", "--contexts", "64x2,x"], "'' is not a whole number"),
        (["generate", "--shape", "2b"], "shape is '2b'; the known ones are 1b, smollm2-135m"),
    ],
)
def test_bench_refuses_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        invoke("bench", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "windw(1, 2)"], "unknown word 'windw'"),
        (["show", "window(1, 2)", "--length", "0"], "length is 0"),
        (
            ["show", "no/such-folder"],
            "'no/such-folder' is no folder here, and no pattern like 'window(255, 0) | first(4)'",
        ),
        (["show", "marked()", "--marked", "x"], "'x' is not a whole number"),
        (["show", "first(1)", "--png", "/nowhere/p.png"], "is no folder; make it first"),
        (["convert", "/nowhere", "out", "--pattern", "first(1)"], "is no folder with a checkpoint"),
        (["export", "/nowhere", "out", "--to", "dense"], "is no folder with a checkpoint"),
        (["export", "/nowhere", "out", "--to", "gguf"], "to is 'gguf'; it must be 'dense' or 'native'"),
        (["card", "/nowhere"], "/nowhere has no config.json"),
        (["bench", "attention", "--dtype", "fp8"], "dtype is 'fp8'"),
        (["bench", "plan", "--lengths", ","], "--lengths is empty"),
        (["bench", "models", "--lengths", "64,x"], "'x' is not a whole number"),
        (["bench", "attention", "--device", "cuda:99"], "device is 'cuda:99', and torch"),
        (["bench", "models", "--device", "cuda:99"], "device is 'cuda:99', and torch"),
        (["bench", "plan", "--device", "cuda:99"], "device is 'cuda:99', and torch"),
        (["bench", "generate", "--device", "cuda:99"], "device is 'cuda:99', and torch"),
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
