"""What a figure is, on which device, and in which file."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from sparse_hf.bench import latest_result, measure, result_path, run_attention, write_json
from sparse_hf.bench.measure import Timer, chosen_device, why_not_run
from sparse_hf.bench.results import machine_name, slope

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for `wait`, whatever the machine's speed."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now.seconds)
    now.wait = lambda seconds: setattr(now, "seconds", now.seconds + seconds)
    return now


def test_seconds_are_the_median_and_do_not_count_the_first_call(clock):
    waits = iter((64.0, 1.0, 8.0, 2.0))
    assert Timer(CPU, 3, 100.0).seconds(lambda: clock.wait(next(waits))) == 2.0
    assert next(waits, None) is None


def test_no_call_begins_once_the_budget_is_spent(clock):
    waits = iter((64.0, 4.0, 7.0, 1.0))
    assert Timer(CPU, 9, 10.0).seconds(lambda: clock.wait(next(waits))) == 5.5
    assert next(waits) == 1.0


def test_a_length_after_one_that_failed_or_took_too_long_is_not_run():
    row, earlier = {"name": "a", "n": 2}, [{"name": "a", "n": 1, "step_s": None, "forward_s": 5.0}]
    assert why_not_run(row, [], ("forward_s",), 1.0) is None
    assert why_not_run({**row, "name": "b"}, earlier, ("forward_s",), 1.0) is None
    assert why_not_run(row, earlier, ("forward_s", "step_s"), 5.0) is None
    assert why_not_run(row, earlier, ("forward_s", "step_s"), 4.0) == "not run: the length before took too long"
    assert why_not_run(row, [{**earlier[0], "failed": "out of memory"}], (), 9.0) == "out of memory"


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:-3"])
def test_devices_without_figures_are_refused(device):
    with pytest.raises(ValueError, match="it must be 'cpu' or 'cuda'|figures are of"):
        chosen_device(device)


def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen_device(name) for name in (None, "cuda", "cuda:0", "cpu")] == [
        torch.device(name) for name in ("cuda", "cuda", "cuda:0", "cpu")
    ]
    with pytest.raises(ValueError, match="device is 'cuda:1', and torch .* finds 1 CUDA devices; use 'cpu'"):
        chosen_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device is 'cuda', and torch .* finds 0 CUDA devices"):
        run_attention([64], device="cuda")


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD EPYC, 2 cores", "cpu-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz, 96 cores", "cpu-96-cores"),
    ],
)
def test_machines_have_short_names(hardware, name):
    assert machine_name(hardware) == name


def test_a_result_in_a_folder_is_named_by_machine_and_date(tmp_path):
    here = {"hardware": "NVIDIA H200", "date": "2026-03-04"}
    assert result_path(tmp_path / "r.json", here, "plan") == tmp_path / "r.json"
    path = result_path(tmp_path, here, "plan")
    assert result_path(tmp_path / "new", here, "plan") == tmp_path / "new" / path.relative_to(tmp_path)
    assert path == tmp_path / "h200" / "2026-03-04-plan.json" and latest_result(tmp_path, here, "plan") is None
    for date in ("2026-03-04", "2026-02-20"):
        write_json({"é": date}, result_path(tmp_path, {**here, "date": date}, "plan"))
        write_json({}, result_path(tmp_path, {**here, "date": "2026-09-09"}, "plan-heads"))
    assert latest_result(tmp_path, here, "plan") == path and json.loads(path.read_text()) == {"é": "2026-03-04"}
    assert sorted(p.name for p in path.parent.iterdir())[-1] == "2026-09-09-plan-heads.json"


def test_slope_is_the_exponent():
    assert slope([2, 4, 8], [3 * n**1.5 for n in (2, 4, 8)]) == pytest.approx(1.5)
    assert slope([2, 4], [1.0, 0.0]) is None and math.isclose(slope([2, 4, 8], [0.0, 1.0, 2.0]), 1.0)


@pytest.mark.parametrize("pattern", ["(window(31, 0) | topk(16)) & causal()", "topk_blocks(2, 32) | window(15, 15)"])
def test_choosing_is_timed_apart_from_attending(pattern):
    result = run_attention([257], pattern=pattern, heads=2, head_dim=16, repeats=1, budget=5)
    rows = {row["name"]: row for row in result["rows"]}
    assert {"auto", "auto, keys given"} <= set(rows)
    assert all(row["relative_error"] < 1e-4 for row in result["rows"])
    # of keys that are chosen no more are counted than a causal text has
    assert 257 <= rows["auto"]["pairs"] <= (257 * 258 // 2 if "causal" in pattern else 257**2)


@pytest.fixture
def without_compiler(monkeypatch):
    """FlexAttention is compiled for half a minute."""
    monkeypatch.setattr("sparse_hf.bench.peers._has_compiler", lambda: False)


def test_values_of_another_width_are_counted(without_compiler, capsys):
    rows = run_attention([130], "window(31, 0)", heads=2, head_dim=24, value_dim=16, repeats=1, budget=5)["rows"]
    assert {"dense", "ours"} <= {row["kind"] for row in rows}
    for row in rows:
        assert row["relative_error"] < 1e-5
        assert row["useful_tflops_forward"] * row["forward_s"] * 1e12 == pytest.approx(2 * 2 * row["pairs"] * (24 + 16))
    # q, k, v and out in float32, and as many gradients
    assert rows[0]["held_bytes"] == 2 * 4 * 2 * 130 * (24 + 24 + 16 + 16)
    assert "heads of 24 (values 16)" in capsys.readouterr().out


def test_dense_kernels_that_refuse_have_a_row(without_compiler, monkeypatch, capsys):
    def refuse(*tensors, **given):
        raise RuntimeError("no kernel of that width")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", refuse)
    dense, *ours = run_attention([64, 130], "window(31, 0)", heads=2, head_dim=16, backends=["blockwise"], repeats=1)[
        "rows"
    ]
    assert dense == {"name": "sdpa_dense", "kind": "dense", "n": 64, "failed": "RuntimeError: no kernel of that width"}
    assert [row["kind"] for row in ours if not row.get("failed")] == ["ours"] * 2
    assert ours[-1]["step_dense_over_ours"] is None and "no kernel of that width" in capsys.readouterr().out
