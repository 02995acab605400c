"""`bench sequence`: processes are started, compared and timed, and one case that fails leaves the others."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparse_hf.bench import SharedTexts, run_sequence, sequence
from sparse_hf.cli import app


def test_cases_run_and_one_that_fails_leaves_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(sequence, "COMPARED", (("tiny", "fp32", "window(15, 0) | first(2)", True),))
    monkeypatch.setattr(sequence, "COMPARED_TOKENS", 128)
    # the other process fails in the same way, and has no more to say
    monkeypatch.setattr(sequence, "ENDING_S", 0.5)
    # torch's ring has no attention for CPUs, so that it fails
    monkeypatch.setattr(sequence, "RINGS", (("flash", "allgather"),))
    asked = ["--processes", "2", "--tokens", "256", "--tokens-each", "0", "--shape", "tiny", "--ring", "128"]
    asked.append("--offload")
    out = tmp_path / "r.json"
    given = ["bench", "sequence", *asked, "--pattern", "window(15, 0) | first(2)", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0 and max(map(len, done.stdout.splitlines())) <= 80, done.stdout
    result = json.loads(out.read_text())
    compared, shared, ring, beside = result["rows"]
    assert result["offload"] and shared["offload"]
    assert compared["gradient_distance"] < 1e-5 and "failed" not in compared
    assert shared["seconds"] > 0 and shared["planned_bytes"] > 0
    # keys and values of a token: 2 heads of 32 in float32; 15 and 2 of them at most, forwards, again and backwards
    assert 0 < shared["bytes_a_layer"] < 3 * 17 * 2 * 2 * 32 * 4 + 200
    assert ring["failed"] == "ValueError: torch's ring has no attention for CPUs"
    assert beside["n"] == 128 and beside["seconds"] > 0
    assert out.with_suffix(".png").stat().st_size > 5000


def test_what_takes_too_long_is_ended():
    result = run_sequence(SharedTexts((1,), 64, None, "tiny", limit_s=0.0), "cpu")
    assert [row["failed"] for row in result["rows"]] == ["stopped after 0 s"]
    result = run_sequence(SharedTexts((1,), 64, None, "tiny", budget_s=-1.0), "cpu")
    assert [row["failed"] for row in result["rows"]] == ["not run: the time for all cases is spent"]


def test_the_fastest_ring_goes_on_while_time_allows():
    asked = SharedTexts((4,), ring=(1000, 2000, 4000), limit_s=100.0)
    common = {"work": "ring", "n": 1000, "rotation": "alltoall"}
    rows = [{**common, "kernel": "flash", "seconds": 20.0}, {**common, "kernel": "cudnn", "seconds": 10.0}]
    longer, longest = sequence._ring_later(asked, rows)
    assert (longer["kernel"], longer["n"]) == ("cudnn", 2000) and "failed" not in longer
    assert longest["failed"] == "not run: it would take some 160 s"


def test_ratios():
    row = {"work": "step", "shape": "1b", "data": 1, "n": 64}
    rows = [
        {**row, "name": sequence.SHARED, "gpus": 1, "seconds": 8.0, "tokens_per_s": 8.0},
        {**row, "name": sequence.SHARED, "gpus": 4, "seconds": 2.5, "tokens_per_s": 25.6},
        {**row, "work": "ring", "name": "ring", "gpus": 4, "seconds": 10.0, "tokens_per_s": 6.4},
    ]
    sequence._add_ratios(rows)
    assert rows[1]["of_linear"] == 0.8 and rows[1]["times_faster_than_ring"] == 4.0
    assert "times_faster_than_ring" not in rows[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": (4, 2)}, r"processes are \[4, 2\]"),
        ({"processes": ()}, "give ascending numbers"),
        ({"tokens": 7}, "7 tokens for 4 processes"),
        ({"large_shape": "80b"}, "shape is '80b'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_refusals_name_the_value(given, message):
    with pytest.raises(ValueError, match=message):
        SharedTexts(**{"shape": "tiny", **given})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(sequence, "chosen_device", lambda device: sequence.torch.device("cuda"))
    monkeypatch.setattr(sequence.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes take 4 GPUs, and there are 2"):
        run_sequence(SharedTexts())
