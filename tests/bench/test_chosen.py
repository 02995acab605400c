"""A layer with an indexer beside Transformers' class: what is right is timed, and what is wrong ends the run."""

from __future__ import annotations

import json

import pytest

from sparse_hf.bench import chosen, run_chosen


def test_parts_and_layers_have_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_hf.bench.measure.gc.collect", lambda: 0)
    out = tmp_path / "result.json"
    run_chosen((80,), "tiny", dtype="fp32", device="cpu", repeats=1, out=out)
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"transformers, eager", "transformers, sdpa", "ours", *chosen.PARTS}
    assert rows["ours"]["forward_transformers_over_ours"] > 0 and rows["ours"]["step_s"] > 0
    assert rows["ours: scores and choice"]["chosen_alike"] == 1 and rows["ours: attention"]["relative_error"] < 1e-5


def test_what_is_wrong_ends_the_run(monkeypatch):
    monkeypatch.setattr(chosen, "attend_latent", lambda query, latents, index, scale: query[..., :12] * 0)
    attending = chosen._parts(chosen.SHAPES["tiny"], "fp32", chosen.Timer(chosen.chosen_device("cpu"), 1, 1.0))
    with pytest.raises(AssertionError, match="is off by"):
        attending["ours: attention"](80, False)
    with pytest.raises(ValueError, match="the known ones are deepseek_v32, tiny"):
        run_chosen((80,), "small")
