"""`tune` chooses the layers that matter, and says whether that was worth it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from sparse_hf import Pattern, parse_layers, sparsify, tune
from sparse_hf.cli.evaluate import read_budget
from sparse_hf.evaluation import Budget, Settings, search
from sparse_hf.evaluation.api import prepare
from sparse_hf.evaluation.budget import pairs_share, uniform
from sparse_hf.evaluation.candidates import Candidate
from sparse_hf.evaluation.heads import copied_attention, copies, groups_of
from sparse_hf.evaluation.probes.recall import questions_of
from sparse_hf.evaluation.search import answer_logits
from sparse_hf.evaluation.subject import Contender
from sparse_hf.evaluation.tune import EVERY, NONE, TUNED, UNIFORM, _verdict
from sparse_hf.pattern import causal
from tests.evaluation.tiny import QUICK, TEXT, tiny_model, tokenizer
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
            (p,), (q,) = (answer_logits(setup, one, [question]) for one in (setup.subject.dense, alone))
            wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
        assert kl == pytest.approx(sum(wanted) / len(wanted), rel=1e-3, abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("last", [40, 512])
def test_what_is_said_at_the_end_of_texts_counts_as_well(found, last, monkeypatch):
    monkeypatch.setattr(search, "TEXT_TOKENS", last)
    model, answers = deep_model(), dict(found.result["ranking"])
    both = run(model, budget=Budget(share=0.4, rank="text")).result["ranking"]
    ids = torch.tensor([tokenizer()(TEXT)["input_ids"][: SETTINGS.length]])
    p = model(ids).logits[0, -last:].log_softmax(-1)
    for layer, kl in both:
        others = ", ".join(f"{other}=dense" for other in range(LAYERS) if other != layer)
        q = sparsify(model, PATTERN, others).eval()(ids).logits[0, -last:].log_softmax(-1)
        assert kl - answers[layer] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2, abs=1e-6)
    assert sum(kl for _, kl in both) > sum(answers.values())


@torch.no_grad()
def test_answers_are_compared_token_by_token():
    model, tokens = tiny_model(), tokenizer()
    setup = prepare(model, [Candidate("local", PATTERN)], TEXT, tokens, SETTINGS)
    question = questions_of(setup)[0][1]
    prompt, answer = tokens(question.prompt)["input_ids"], tokens(f" {question.answers[0]}")["input_ids"]
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(
        answer_logits(setup, setup.subject.dense, [question])[0], logits.log_softmax(-1), rtol=1e-4, atol=1e-5
    )


def test_questions_that_are_read_together_choose_the_same(found):
    together = run(settings=replace(SETTINGS, batch=3))
    assert together.layers == found.layers
    for one, other in zip(found.result["ranking"], together.result["ranking"], strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_choice_is_checked_on_texts_that_are_held_out(tmp_path):
    (tmp_path / "other.txt").write_text(TEXT[::-1] + TEXT)
    found = run(settings=replace(SETTINGS, held_out=(tmp_path / "other.txt",)))
    assert {text["name"] for text in found.result["held_out"]["texts"]} == {"other.txt"}
    (tmp_path / "other.txt").write_text("Short.")
    with pytest.raises(ValueError, match=r"other\.txt has \d+ tokens, and 96 of each text are read"):
        run(settings=replace(SETTINGS, held_out=(tmp_path / "other.txt",)))
    (tmp_path / "other.txt").write_text(" ")
    # there are no weights to be read
    with pytest.raises(ValueError, match=r"other\.txt is empty"):
        tune(tmp_path, PATTERN, TEXT, settings=replace(SETTINGS, held_out=(tmp_path / "other.txt",)))


def test_it_stands_beside_as_many_layers_evenly_spaced(found):
    held_out = found.result["held_out"]
    assert [one["name"] for one in held_out["candidates"]] == ["dense", TUNED, EVERY, UNIFORM, NONE]
    layers = {one["name"]: one["layers"] for one in held_out["candidates"]}
    assert layers[TUNED].count("dense") == layers[EVERY].count("dense") == 2 and layers[NONE].count("dense") == 0
    assert found.result["every_nth"] == "0=dense, 2=dense" and held_out["settings"]["seed"] == SETTINGS.seed + 1
    # both are the same layers here, so that neither beats the other
    assert not found.beats_every_nth and "does not beat as many layers" in str(found)


def test_a_wider_window_everywhere_takes_as_many_pairs(found):
    wider = Pattern.parse(found.result["uniform"])
    length = SETTINGS.lengths[0]
    # two of five layers have all pairs, and the others those of the pattern
    wanted = 0.4 + 0.6 * causal_pairs(PATTERN, length)
    assert causal_pairs(wider, length) <= wanted < causal_pairs(wider, length) + 2 / length
    assert found.beats_uniform is not None and uniform(Pattern.parse("stride(4)"), 0.5, length) is None
    layers = {one["name"]: one["layers"] for one in found.result["held_out"]["candidates"]}
    assert layers[UNIFORM] == [str(wider)] * LAYERS


def allowed(pattern: str, length: int) -> torch.Tensor:
    """The mask of a pattern."""
    at = torch.arange(length)
    return Pattern.parse(pattern).allows(at[:, None], at[None])


def causal_pairs(pattern, length: int) -> float:
    """The share of a decoder's pairs, counted one by one."""
    mask = allowed(str(Pattern.parse(str(pattern)) & causal()), length)
    return float(mask.sum()) / (length * (length + 1) / 2)


def test_budgets_that_cannot_be():
    with pytest.raises(ValueError, match="for all heads of a layer"):
        Budget(of="cache", by="heads")
    with pytest.raises(ValueError, match="of is 'bytes'; it must be one of layers, pairs, cache, time"):
        Budget(of=cast(Any, "bytes"))


def test_copies_by_hand():
    # the answer 7 8 stands behind 5, and its first token alone elsewhere
    found = copies([7, 5, 7, 8, 9], [7, 8])
    assert found.tolist() == [[True, False, True, False, False, False], [False, False, False, True, False, False]]


@torch.no_grad()
@pytest.mark.parametrize("head", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_copied_attention_is_that_of_the_stock_model(head):
    model, tokens = tiny_model(head), tokenizer()
    settings = replace(SETTINGS, tasks=("passkey",))
    setup = prepare(model, [Candidate("local", PATTERN)], TEXT, tokens, settings)
    question = questions_of(setup)[0][1]
    patterns = [setup.candidates[0].config.layer_pattern(layer, True) for layer in range(2)]
    found = copied_attention(setup.subject, patterns, question)
    prompt, answer = tokens(question.prompt)["input_ids"], tokens(question.wanted)["input_ids"]
    stock = tiny_model(head, attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    weights = stock(torch.tensor([[*prompt, *answer]]), output_attentions=True).attentions
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    for layer, of_layer in enumerate(weights):
        length = len(prompt) + len(answer)
        far = copies(prompt, answer) & ~allowed(patterns[layer], length)[rows, :-1]
        own = (of_layer[0, :, rows, :-1] * far).sum(-1).mean(-1)
        groups = len(found[layer])
        assert found[layer] == pytest.approx(own.view(groups, -1).mean(-1).tolist(), abs=1e-6)
    assert sum(map(sum, found.values())) > 0


def test_heads_stay_dense_where_they_copy():
    found = run(budget=Budget(share=0.4, by="heads"))
    groups = groups_of(deep_model().config)
    chosen = {name for name, _ in found.result["heads"][: 2 * groups]}
    patterns = parse_layers(found.layers, LAYERS, PATTERN)
    dense = {
        f"{layer}.{head * groups // len(heads)}"
        for layer, pattern in enumerate(patterns)
        for heads in [pattern.heads or (pattern,) * groups]
        for head, own in enumerate(heads)
        if str(own) != PATTERN
    }
    assert dense == chosen and found.result["by"] == "heads" and "layer.group of heads" in str(found)
    weights = [weight for _, weight in found.result["heads"]]
    assert weights == sorted(weights, reverse=True) and len(weights) == LAYERS * groups
    # what is printed can be given to a model
    sparsify(deep_model(), PATTERN, found.layers)


def test_layers_are_ranked_by_attention_with_a_pass_for_each_question(tmp_path):
    found = run(budget=Budget(share=0.4, by="both", rank="attention"), out=tmp_path)
    kinds = Counter(json.loads(path.read_text())["candidate"] for path in (tmp_path / "pieces").glob("tune-*"))
    # two questions are looked at, and layers stand beside heads once
    assert kinds == {"heads": 2, "answers": 2}
    moved = found.result["answers_moved"]
    assert found.result["by"] == min(moved, key=lambda name: moved[name])
    written = json.loads((tmp_path / "layers.json").read_text())
    assert written == {"pattern": PATTERN, "layers": found.layers}


@pytest.mark.parametrize(
    ("own", "other", "questions", "beats"),
    [
        ((0.5, 1.0), (0.4, 0.5), 100, True),
        # of ten questions one more is chance: 0.22 is a standard error
        ((0.5, 1.0), (0.4, 0.5), 10, False),
        ((0.4, 0.5), (0.5, 1.0), 10, True),
        ((0.5, 1.0), (0.5, 1.2), 100, True),
        ((0.5, 1.2), (0.5, 1.2), 100, False),
        ((0.3, 0.1), (0.5, 2.0), 100, False),
    ],
)
def test_it_beats_by_recall_and_then_by_loss(own, other, questions, beats):
    names = {TUNED: own, EVERY: other, UNIFORM: (0.1, 3.0), NONE: (0.0, 3.0), "dense": (1.0, 0.1)}
    # two depths, of which the first is never recalled
    recall = {
        name: {
            "recalled": recalled, "loss": loss,
            "tasks": {"needle": [{"depth": 0.1, "recalled": 0.0}, {"depth": 0.9, "recalled": 2 * recalled}]},
        }
        for name, (recalled, loss) in names.items()
    }  # fmt: skip
    perplexity = {name: {"perplexity": 9.0} for name in names}
    found, words = _verdict({"recall": {"candidates": recall}, "perplexity": {"candidates": perplexity}}, questions)
    assert found == {EVERY: beats, UNIFORM: True} and ("does not beat as many layers" not in words) is beats
    assert ("take what is best" in words) is not beats and "a wider window in every layer" in words
    assert words.startswith(f"On {questions} other questions") and f"(0% at 0.1, {2 * own[0]:.0%} at 0.9)" in words


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
        ({"budget": Budget(share=0.05, of="pairs")}, "leaves nothing for dense layers"),
        ({"model": "BertForMaskedLM"}, "tune asks questions of recall: SparseBertForMaskedLM says nothing"),
        ({"texts": "short"}, "text 1 has 5 tokens"),
        ({"pattern": "window(279, 0)"}, "leaves nothing out of 280 tokens, so that there is nothing to choose by"),
    ],
)
def test_bad_input(options, message):
    if "model" in options:
        options = {"model": tiny_model(options["model"])}
    with pytest.raises(ValueError) as caught:
        run(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [111, 280, 1000])
@pytest.mark.parametrize("pattern", ["full()", "window(1023, 0) | first(4)", "per_head(window(1023, 0), full())"])
def test_all_pairs_are_all_of_any_length(pattern, length):
    """Of a share that is rounded, none of them would be told from a pattern that leaves pairs out."""
    assert pairs_share(Pattern.parse(pattern), length) == 1
    assert pairs_share(Pattern.parse(f"window({length - 2}, 0)"), length) < 1


def test_the_command_goes_on_from_its_folder(tmp_path):
    deep_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[50:])
    arguments = (
        "tune", str(tmp_path / "model"), "--pattern", PATTERN, "--text", str(tmp_path / "text.txt"), "--length", "96", "--lengths",
        "280", "--depths", "0.2", "--tasks", "passkey", "--budget", "40%", "--out", str(tmp_path / "out"), "--held-out",
        str(tmp_path / "other.txt"), "--batch", "2", "--dtype", "float32",
    )  # fmt: skip
    first = run_command(*arguments)
    assert first.returncode == 0, first.stderr
    assert "layers='0=dense, 2=dense'" in first.stdout and (tmp_path / "out" / "report.html").exists()
    # what it wrote is given to convert
    made = ("--layers", str(tmp_path / "out" / "layers.json"))
    converted = run_command("convert", str(tmp_path / "model"), str(tmp_path / "sparse"), *made)
    assert converted.returncode == 0, converted.stderr
    found = json.loads((tmp_path / "sparse" / "config.json").read_text())["sparse_attention"]
    assert (
        found["layers"] == ["dense", "sparse", "dense", "sparse", "sparse"] and found["patterns"]["sparse"] == PATTERN
    )
    wrong = run_command("convert", str(tmp_path / "model"), "unused", "--pattern", PATTERN, "--layers", "absent.json")
    assert wrong.returncode and "there is no file absent.json" in wrong.stderr
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pieces").iterdir()}
    again = run_command(*arguments, "--json")
    assert json.loads(again.stdout)["layers"] == "0=dense, 2=dense"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pieces").iterdir()} == pieces


CHOSEN = "window(3, 0) | topk(4)"


@pytest.mark.parametrize("of", ["layers", "pairs"])
def test_layers_beside_a_choice_by_content(of):
    found = tune(
        tiny_model(num_hidden_layers=3),
        CHOSEN,
        TEXT,
        budget=Budget(share=0.7, of=of),
        tokenizer=tokenizer(),
        settings=QUICK,
    )
    assert found.result["pattern"] == CHOSEN and "dense" in found.layers


@pytest.mark.parametrize(
    ("pattern", "budget", "message"),
    [
        (CHOSEN, Budget(by="heads"), r"topk\(4\) chooses keys by content.*--by layers --rank answers"),
        (CHOSEN, Budget(by="both", of="pairs"), r"chooses keys by content"),
        (CHOSEN, Budget(rank="attention"), r"chooses keys by content"),
        ("topk(4, 'indexer')", Budget(), r"has indexers with new weights.*train_indexer"),
        ("topk(300)", Budget(), r"topk\(300\) leaves nothing out of 260 tokens"),
    ],
)
def test_choices_that_cannot_be_tuned_are_refused_before_anything_runs(pattern, budget, message, monkeypatch):
    monkeypatch.setitem(tune.__globals__, "best_choice", None)
    with pytest.raises(ValueError, match=message):
        tune(tiny_model(), pattern, TEXT, budget=budget, tokenizer=tokenizer(), settings=QUICK)


@pytest.mark.parametrize(("text", "share"), [("0.25", 0.25), ("25%", 0.25), ("12.5%", 0.125)])
def test_a_budget_is_a_share_or_per_cent(text, share):
    assert read_budget(text) == share


def test_what_is_no_budget_is_named():
    with pytest.raises(ValueError, match="--budget is 'a quarter'; give a share, like 0.25 or 25%"):
        read_budget("a quarter")


def test_a_folder_of_texts_is_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give the files in it, one by one"):
        tune(tiny_model(), CHOSEN, [tmp_path], tokenizer=tokenizer(), settings=QUICK)
