"""An evaluation on a GPU is that of a CPU: strips, chunks and questions that go together change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparse_hf import Pattern, evaluate, tune
from sparse_hf.evaluation import Budget, Candidate
from sparse_hf.evaluation.api import prepare
from sparse_hf.evaluation.choice import search_of
from sparse_hf.evaluation.search import Unit
from sparse_hf.evaluation.spending import Spending
from tests.evaluation.tiny import QUICK, TEXT, tiny_model, tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PATTERNS = {"sinks": "window(20, 0) | first(2)", "strided": "window(7, 0) | stride(16)"}
SETTINGS = replace(QUICK, length=257, lengths=(300,), depths=(0.1, 0.5), tasks=("passkey", "pairs"))


def test_figures_are_those_of_the_cpu():
    probes = ["divergence", "perplexity", "coverage", "recall"]
    found = [
        evaluate(tiny_model().to(device), PATTERNS, TEXT, probes=probes, tokenizer=tokenizer(), settings=settings).result["probes"]
        for device, settings in (("cpu", SETTINGS), ("cuda", replace(SETTINGS, batch=3)))
    ]  # fmt: skip
    for probe, key in (("perplexity", "perplexity"), ("divergence", "kl"), ("coverage", "kept"), ("recall", "loss")):
        on_cpu, on_gpu = (
            {name: one[key] for name, one in of_device[probe]["candidates"].items()} for of_device in found
        )
        assert on_gpu == pytest.approx(on_cpu, rel=1e-3, abs=1e-5), probe
    for name in PATTERNS:
        one, other = (of_device["coverage"]["candidates"][name] for of_device in found)
        assert other["by_layer"] == pytest.approx(one["by_layer"], abs=1e-4)


def test_the_same_heads_stay_dense():
    chosen = [
        tune(tiny_model().to(device), PATTERNS["sinks"], TEXT, budget=Budget(share=0.5, by="both"), tokenizer=tokenizer(),
             settings=replace(SETTINGS, batch=batch)).result
        for device, batch in (("cpu", 1), ("cuda", 4))
    ]  # fmt: skip
    for one, other in zip(*(found["heads"] for found in chosen), strict=True):
        assert other == [one[0], pytest.approx(one[1], rel=1e-3)]
    assert [layer for layer, _ in chosen[1]["ranking"]] == [layer for layer, _ in chosen[0]["ranking"]]


def test_time_is_that_of_the_gpu():
    setup = prepare(tiny_model().to("cuda"), [Candidate("local", PATTERNS["sinks"])], TEXT, tokenizer(), SETTINGS)
    spending = Spending(search_of(setup, Pattern.parse(PATTERNS["sinks"]), None), Budget(share=0.9, of="time"), 300)
    told = spending.told([Unit(0), Unit(1, 0)])
    assert torch.cuda.get_device_name() in told["machine"]
    assert all(0 < told[name] < 1 for name in ("dense_s", "local_s", "chosen_s"))
