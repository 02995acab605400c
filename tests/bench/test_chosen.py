"""A layer with an indexer beside Transformers' class: what is right is timed, and what is wrong ends the run."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

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


def test_the_choice_of_attn_gym_is_asked_for_as_it_takes_it(monkeypatch):
    def lightning_indexer(q, k, weights, topk, *, causal=False):
        assert causal and weights.dtype == q.dtype == torch.bfloat16
        scores = (torch.einsum("bthd,bsd->bths", q.double(), k.double()).relu() * weights[..., None].double()).sum(2)
        n = q.shape[1]
        best = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).topk(topk)
        return best.indices.masked_fill(best.values == -torch.inf, -1).int()

    for name in ("attn_gym", "attn_gym.sparse", "attn_gym.sparse.indexer"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["attn_gym.sparse.indexer"].lightning_indexer = lightning_indexer
    shape = chosen.SHAPES["tiny"]
    scorer = chosen.drawn_scores(shape, 100, torch.bfloat16, torch.device("cpu"))
    found = chosen.chosen_by_attn_gym(scorer, shape.count)
    assert found.shape == (1, 1, 100, shape.count) and chosen.same_choice(scorer, found) == 1
    timer = chosen.Timer(torch.device("cuda"), 1, 1.0)
    assert set(chosen._parts(shape, "bf16", timer)) == {*chosen.PARTS, chosen.ATTN_GYM}
