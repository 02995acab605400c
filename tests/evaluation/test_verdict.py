"""Words for figures: each verdict on figures made by hand."""

from __future__ import annotations

import pytest

from sparse_hf.evaluation import Settings
from sparse_hf.evaluation.candidates import read_candidates
from sparse_hf.evaluation.probes.base import Setup
from sparse_hf.evaluation.subject import open_subject
from sparse_hf.evaluation.verdict import verdicts
from tests.evaluation.tiny import tiny_model, tokenizer


def judged(results: dict, patterns="window(9, 0)", head: str = "LlamaForCausalLM", **changes) -> dict:
    subject = open_subject(tiny_model(head, **changes), read_candidates(patterns), tokenizer(), Settings(length=96))
    setup = Setup(subject, (), (), Settings(length=96))
    return verdicts(setup, results)[0]


def figures(perplexity: float = 10.0, recall: float = 1.0, same: float = 0.95, name: str = "window(9, 0)") -> dict:
    def of(key: str, own: float, dense: float) -> dict:
        tasks = {"passkey": [{"recalled": own, "length": 96, "depth": 0.5, "loss": 1.0}]}
        return {
            "candidates": {
                "dense": {key: dense, "tasks": {"passkey": [{"recalled": dense, "depth": 0.5}]}},
                name: {key: own, "tasks": tasks},
            }
        }

    return {
        "perplexity": of("perplexity", perplexity, 10.0),
        "recall": of("recalled", recall, 1.0),
        "divergence": {"candidates": {name: {"same": same, "kl": 0.01, "hidden_error": [0.0, 0.1]}}},
    }


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "safe as it is"),
        ({"perplexity": 10.19, "recall": 0.9, "same": 0.9}, "safe as it is"),
        ({"perplexity": 10.3}, "heal first"),
        ({"recall": 0.5}, "heal first"),
        ({"same": 0.8}, "heal first"),
        ({"perplexity": 16.0}, "not usable without long training"),
    ],
)
def test_the_verdict_goes_by_what_is_lost(given, verdict):
    found = judged(figures(**given))
    assert found["verdict"] == verdict
    assert bool(found["remedies"]) == (verdict != "safe as it is")


@pytest.mark.parametrize(
    ("pattern", "verdict"),
    [
        ("window(94, 0)", "safe as it is"),
        ("window(95, 0)", "nothing measured"),
        ("window(None, 0)", "safe as it is"),
        ("topk(95)", "safe as it is"),
        ("topk(96)", "nothing measured"),
        ("window(31, 0) | topk(64)", "nothing measured"),
        ("topk_blocks(11, 8)", "safe as it is"),
        ("topk_blocks(12, 8)", "nothing measured"),
        ("threshold(0.5)", "safe as it is"),
    ],
)
def test_what_leaves_nothing_out_is_not_called_safe(pattern, verdict):
    found = judged(figures(name=pattern), pattern)
    assert found["verdict"] == verdict
    assert any("leaves out nothing of 96 tokens" in reason for reason in found["reasons"]) == (
        verdict == "nothing measured"
    )
    assert not found["remedies"]


def test_of_indexers_with_new_weights_nothing_is_said():
    found = judged(figures(perplexity=16.0, name="topk(5, 'indexer')"), "topk(5, 'indexer')")
    assert found["verdict"] == "nothing measured" and not found["remedies"]
    assert "train them (sparse_hf.train.train_indexer)" in found["reasons"][-1]


def test_reasons_name_the_figures():
    found = judged(figures(perplexity=12.0, recall=0.25))
    assert found["reasons"][0] == "perplexity 12.00, dense 10.00 (+20.0%)"
    assert found["reasons"][1] == "recalls 25% of the facts, dense 100%; worst in passkey"


def test_a_window_that_recalls_what_it_sees_is_named():
    results = figures(recall=0.3)
    found = results["recall"]["candidates"]
    # at 0.1 nobody recalls, at 0.9 the window does, and what has no depth counts nowhere
    found["window(9, 0)"]["tasks"]["passkey"] += [{"recalled": 0.0, "depth": d} for d in (0.1, 0.5, 0.9, None)]
    found["window(9, 0)"]["tasks"]["passkey"] += [{"recalled": 0.9, "depth": 0.9}]
    found["dense"]["tasks"]["passkey"] += [{"recalled": 0.0, "depth": 0.1}, {"recalled": 1.0, "depth": 0.9}]
    found["window(9, 0)"]["tasks"]["passkey"][0]["recalled"] = 0.0
    words = judged(results)["reasons"][1]
    assert words == "recalls 30% of the facts, dense 100%; worst in passkey; none of those at 0.5 of the text"


def test_what_dense_does_not_recall_says_nothing():
    results = figures(recall=0.0)
    results["recall"]["candidates"]["dense"]["recalled"] = 0.0
    assert judged(results)["verdict"] == "safe as it is"


def test_nothing_measured_is_no_verdict():
    assert judged({})["verdict"] == "nothing measured"


def test_what_is_not_heard_and_what_brings_it_back():
    found = judged(figures(perplexity=12.0))
    assert found["hears"] == {"length": 96, "tokens": 19, "back": 18}
    assert found["cannot_hear"].startswith("through all 2 layers the last token hears 19 of 96 tokens, at most 18 back")
    assert "to hear 96 tokens through 2 layers takes windows of 48 tokens, or dense layers between" in found["remedies"]
    assert any(remedy.startswith("nothing is global: add first(4)") for remedy in found["remedies"])
    assert "keep some layers dense; `sparse-hf tune` chooses those that answers need" in found["remedies"]


def test_gaps_are_named_as_gaps():
    gapped = "stride(2) & window(95, 0)"
    found = judged(figures(perplexity=12.0, name=gapped), gapped)
    assert any("not even its neighbour is heard" in remedy for remedy in found["remedies"])


def test_layers_that_lose_most_are_named():
    kept = [0.9, 0.2, 0.8, 0.7]
    name = "three: window(9, 0); 2=dense"
    results = figures(perplexity=12.0, name="three") | {
        "coverage": {"layers": [0, 1, 2, 3], "candidates": {"three": {"by_layer": kept}}}
    }
    found = judged(results, name, num_hidden_layers=4)
    named = "keep dense the layers that lose most attention, too: layers='1-2=dense'"
    assert f"{named}; `sparse-hf tune` chooses those that answers need" in found["remedies"]


def test_layers_that_slide_by_themselves_are_not_named():
    kept = {"coverage": {"layers": [0, 1, 2], "candidates": {"window(9, 0)": {"by_layer": [0.2, 0.1, 0.9]}}}}
    types = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    found = judged(figures(perplexity=12.0) | kept, head="Gemma3ForCausalLM", **types)
    assert "keep dense the layers that see everything in the dense model: layers='2=dense'" in found["remedies"]
    assert not any("0" in remedy for remedy in found["remedies"] if remedy.startswith("keep"))
    widened = judged(figures(perplexity=12.0, name="wide"), "wide: window(9, 0); 0=dense", "Gemma3ForCausalLM", **types)
    assert "let layers 0 slide as they do in the dense model, which never saw more there" in widened["remedies"]


def test_encoders_hear_from_their_first_token():
    found = judged({}, "window(9, 9)", "BertModel")
    assert found["cannot_hear"].startswith(
        "through all 2 layers the first token hears 19 of 96 tokens, at most 18 away"
    )
    assert judged({}, "window(9, 9) | first(1)", "BertModel")["cannot_hear"] is None
