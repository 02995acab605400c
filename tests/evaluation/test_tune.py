"""`tune` chooses the layers that matter, and says whether that was worth it."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_hf import parse_layers, sparsify, tune
from sparse_hf.evaluation import Settings
from sparse_hf.evaluation.api import prepare
from sparse_hf.evaluation.candidates import Candidate
from sparse_hf.evaluation.probes.recall import questions_of
from sparse_hf.evaluation.search import answer_logits
from sparse_hf.evaluation.subject import Contender
from sparse_hf.evaluation.tune import EVERY, NONE, TUNED, _verdict
from tests.evaluation.tiny import TEXT, tiny_model, tokenizer
from tests.test_cli import run as run_command

PATTERN, LAYERS = "window(9, 0) | first(2)", 5
SETTINGS = Settings(length=96, lengths=(280,), depths=(0.2,), tasks=("passkey", "pairs"), progress=False)


def deep_model():
    """Five layers whose attention weighs most in the third, then in the first."""
    model = tiny_model(num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (2.0, 0.01, 8.0, 0.01, 0.01), strict=True):
            layer.self_attn.o_proj.weight.mul_(10 * factor)
    return model


def run(model=None, pattern: str = PATTERN, texts=TEXT, **options):
    options = {"tokenizer": tokenizer(), "settings": SETTINGS, "budget": 0.4, **options}
    return tune(model or deep_model(), pattern, texts, **options)


@pytest.fixture(scope="module")
def found():
    return run()


def test_layers_that_matter_stay_dense(found):
    assert found.layers == "0=dense, 2=dense"
    assert {layer for layer, _ in found.result["ranking"][:2]} == {0, 2}
    patterns = parse_layers(found.layers, LAYERS, PATTERN)
    assert [str(pattern) == PATTERN for pattern in patterns] == [False, True, False, True, True]


def test_the_ranking_is_that_of_models_made_sparse_one_by_one(found):
    model = deep_model()
    setup = prepare(model, [Candidate("local", PATTERN)], TEXT, tokenizer(), SETTINGS)
    questions = [question for _, question in questions_of(setup)]
    for layer, kl in found.result["ranking"]:
        others = ", ".join(f"{other}=dense" for other in range(LAYERS) if other != layer)
        alone = Contender("", sparsify(model, PATTERN, others).eval(), "")
        wanted = []
        for question in questions:
            p, q = answer_logits(setup, setup.subject.dense, question), answer_logits(setup, alone, question)
            wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
        assert kl == pytest.approx(sum(wanted) / len(wanted), rel=1e-3, abs=1e-7)


@torch.no_grad()
def test_answers_are_compared_token_by_token():
    model, tokens = tiny_model(), tokenizer()
    setup = prepare(model, [Candidate("local", PATTERN)], TEXT, tokens, SETTINGS)
    question = questions_of(setup)[0][1]
    prompt, answer = tokens(question.prompt)["input_ids"], tokens(f" {question.answers[0]}")["input_ids"]
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(
        answer_logits(setup, setup.subject.dense, question), logits.log_softmax(-1), rtol=1e-4, atol=1e-5
    )


def test_it_stands_beside_as_many_layers_evenly_spaced(found):
    held_out = found.result["held_out"]
    assert [one["name"] for one in held_out["candidates"]] == ["dense", TUNED, EVERY, NONE]
    layers = {one["name"]: one["layers"] for one in held_out["candidates"]}
    assert layers[TUNED].count("dense") == layers[EVERY].count("dense") == 2 and layers[NONE].count("dense") == 0
    assert found.result["every_nth"] == "0=dense, 2=dense" and held_out["settings"]["seed"] == SETTINGS.seed + 1
    # both are the same layers here, so that neither beats the other
    assert not found.beats_every_nth and "do not beat" in str(found)


@pytest.mark.parametrize(
    ("own", "other", "beats"),
    [((0.5, 1.0), (0.4, 0.5), True), ((0.5, 1.0), (0.5, 1.2), True), ((0.5, 1.2), (0.5, 1.2), False), ((0.3, 0.1), (0.5, 2.0), False)],
)  # fmt: skip
def test_it_beats_by_recall_and_then_by_loss(own, other, beats):
    names = {TUNED: own, EVERY: other, NONE: (0.0, 3.0), "dense": (1.0, 0.1)}
    recall = {name: {"recalled": recalled, "loss": loss} for name, (recalled, loss) in names.items()}
    perplexity = {name: {"perplexity": 9.0} for name in names}
    found, words = _verdict({"recall": {"candidates": recall}, "perplexity": {"candidates": perplexity}})
    assert found is beats and ("do not beat" not in words) is beats


def test_windows_of_the_family_stay():
    model = tiny_model("Gemma3ForCausalLM", num_hidden_layers=2)
    found = run(model, budget=0.5)
    # the first layer slides by itself, and only the second can be dense
    assert found.layers == "1=dense"
    with pytest.raises(ValueError, match="a budget of 0.9 is 2 dense layers, and 1 can be dense"):
        run(model, budget=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 1.0}, "budget is 1.0"),
        ({"model": "BertForMaskedLM"}, "tune asks questions of recall: SparseBertForMaskedLM says nothing"),
        ({"texts": "short"}, "text 1 has 5 tokens"),
    ],
)
def test_bad_input(options, message):
    if "model" in options:
        options = {"model": tiny_model(options["model"])}
    with pytest.raises(ValueError) as caught:
        run(**options)
    assert message in str(caught.value)


def test_the_command_goes_on_from_its_folder(tmp_path):
    deep_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = (
        "tune", str(tmp_path / "model"), "--pattern", PATTERN, "--text", str(tmp_path / "text.txt"), "--length", "96", "--lengths",
        "280", "--depths", "0.2", "--tasks", "passkey", "--budget", "0.4", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    first = run_command(*arguments)
    assert first.returncode == 0, first.stderr
    assert "layers='0=dense, 2=dense'" in first.stdout and (tmp_path / "out" / "report.html").exists()
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pieces").iterdir()}
    again = run_command(*arguments, "--json")
    assert json.loads(again.stdout)["layers"] == "0=dense, 2=dense"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pieces").iterdir()} == pieces
