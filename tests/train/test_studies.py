"""The studies run with `--tiny`, and keep what they have measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from examples import (
    sotu,
    studies,
    study_classification,
    study_healing,
    study_healing_long,
    study_indexer,
    study_streaming,
    study_tuning,
    tiny,
)
from examples.assets import GUTENBERG
from tests import oracle

# peft asks Transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore::UserWarning")
TINY = study_healing.TINY


def run(study, folder: Path, *options: str) -> dict:
    out, picture = folder / "study.json", folder / "study.png"
    content = study.main(["--tiny", "--out", str(out), "--plot", str(picture), *options])
    assert json.loads(out.read_text()) == json.loads(json.dumps(content)) and picture.stat().st_size > 10_000
    return content


def perplexity(mask: torch.Tensor | None, edges: tuple[int, ...], length: int = 64) -> list[float]:
    """Perplexity of the tiny held-out texts by the dense model, with a mask of pairs.

    Of all tokens, and between edges.
    """
    case = study_healing.TINY
    model, tokenizer = case.load().eval(), case.tokenizer()
    sums, counts = torch.zeros(len(edges) + 1), torch.zeros(len(edges) + 1)
    for text in case.held_out().values():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for at in range(0, len(ids) - length + 1, length):
            row = torch.tensor([ids[at : at + length]])
            with torch.no_grad():
                logits = model(row, attention_mask=mask).logits[0].log_softmax(-1)
            for place in range(length - 1):
                part = sum(place >= edge for edge in edges)
                sums[part] -= logits[place, row[0, place + 1]]
                counts[part] += 1
    return [math.exp(sums.sum() / counts.sum()), *(sums / counts).exp().tolist()]


def scaled():
    """The tiny model with larger weights, so that a pattern shows."""
    model = TINY.load()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(5)
    return model


@pytest.mark.slow
def test_healing_measures_perplexity_of_books_that_it_does_not_train_on(tmp_path, monkeypatch):
    monkeypatch.setattr(study_healing, "TINY", dataclasses.replace(TINY, load=scaled))
    content = run(study_healing, tmp_path, "--steps", "4", "--eval-steps", "2")
    entries, case = content["entries"], study_healing.TINY
    assert list(entries) == list(study_healing.VARIANTS)
    pairs = oracle.dense_mask(case.pattern, 64, 64) & torch.ones(64, 64, dtype=torch.bool).tril()
    for name, mask in (("dense", None), ("sparse", pairs)):
        found = [entries[name]["perplexity"], *entries[name]["by_position"].values()]
        # computed with in bfloat16
        assert found == pytest.approx(perplexity(mask, case.edges), rel=2e-3)
    for name, entry in entries.items():
        kind = "dense" if name.startswith("dense") else "sparse"
        # all begin where the model that is not trained stays
        assert entry["curve"][0] == entries[kind]["curve"][0]
        assert entry["model"] == {"dense": "LlamaForCausalLM", "sparse": "SparseLlamaForCausalLM"}[kind]
        if name != kind:
            assert entry["perplexity"] < entries[kind]["perplexity"] and entry["tokens_per_s"] > 0
            assert [tokens for tokens, _ in entry["curve"]] == [0, 2 * 4 * 64, 4 * 4 * 64]
    assert entries["sparse, LoRA"]["parameters_trained"] < entries["sparse, trained"]["parameters_trained"]
    (tmp_path / "study.png").unlink()
    study_healing.main(["--plot-only", "--out", str(tmp_path / "study.json"), "--plot", str(tmp_path / "study.png")])
    assert (tmp_path / "study.png").exists()


def elsewhere(monkeypatch, hardware: str) -> None:
    """From now on the studies run on another machine."""
    here = studies.environment
    monkeypatch.setattr(studies, "environment", lambda device: {**here(device), "hardware": hardware})


def test_entries_of_an_earlier_run_are_kept_if_it_had_the_same_settings(tmp_path):
    run(study_healing, tmp_path, "--variants", "sparse")
    entries = run(study_healing, tmp_path, "--variants", "dense")["entries"]
    assert list(entries) == ["dense", "sparse"]
    with pytest.raises(ValueError, match="has other steps, tokens, epochs; name another file"):
        run(study_healing, tmp_path, "--variants", "dense", "--steps", "3")
    assert json.loads((tmp_path / "study.json").read_text())["entries"] == json.loads(json.dumps(entries))


@pytest.mark.slow
def test_the_distilled_model_is_added_to_what_another_machine_measured(tmp_path, monkeypatch, capsys):
    # else student and teacher hardly differ
    monkeypatch.setattr(study_healing, "TINY", dataclasses.replace(TINY, load=scaled))
    run(study_healing, tmp_path, "--variants", "dense", "sparse", "sparse, trained")
    before = studies.read(tmp_path / "study.json")["entries"]
    elsewhere(monkeypatch, "another card")
    entries = run(study_healing, tmp_path, "--variants", "sparse, distilled")["entries"]
    assert list(entries) == [*before, "sparse, distilled"] and before.items() <= entries.items()
    added, trained = entries["sparse, distilled"], entries["sparse, trained"]
    assert added["environment"]["hardware"] == "another card" != trained["environment"]["hardware"]
    assert "another card, 20" in capsys.readouterr().out
    # all weights, the same rows and steps, and a loss that the teacher adds to
    for key in ("learning_rate", "parameters_trained"):
        assert added[key] == trained[key]
    assert [point[0] for point in added["curve"]] == [point[0] for point in trained["curve"]]
    assert trained["distillation"] is None and added["distillation"]["logits"] == 1.0
    assert added["losses"][0][1] > trained["losses"][0][1] + 0.01


def test_files_that_named_their_machine_once_are_read(tmp_path):
    content = run(study_healing, tmp_path, "--variants", "sparse")
    here = content["entries"]["sparse"].pop("environment")
    (tmp_path / "study.json").write_text(json.dumps({"environment": here, **content}))
    assert run(study_healing, tmp_path, "--variants", "dense")["entries"]["sparse"]["environment"] == here


def test_held_out_books_are_of_the_package():
    books = {Path(name).stem for name in GUTENBERG.members.values()}
    assert len(books) == 18 and set(study_healing.HELD_OUT) < books


def test_what_only_the_end_says_is_found_by_those_who_read_it(tmp_path):
    chosen = ["dense, 32 tokens", "sparse, 32 tokens", "dense, chunks of 32", "sparse, 128 tokens"]
    entries = run(study_classification, tmp_path, "--seeds", "1", "--steps", "40", "--variants", *chosen)["entries"]
    accuracy = {name: entry["accuracy"]["mean"] for name, entry in entries.items()}
    for name in ("majority", "bag of 32 tokens", "dense, 32 tokens", "sparse, 32 tokens"):
        assert accuracy[name] == 0.5, name
    for name in ("bag of 128 tokens", "dense, chunks of 32", "sparse, 128 tokens"):
        assert accuracy[name] == 1.0, name
    assert entries["majority"]["macro_f1"]["mean"] == pytest.approx(1 / 3)


def test_lengths_are_added_one_by_one(tmp_path, monkeypatch):
    quick = ["--seeds", "1", "--steps", "2", "--variants"]
    run(study_classification, tmp_path, *quick, "dense, 32 tokens", "sparse, 128 tokens")
    before = studies.read(tmp_path / "study.json")["entries"]
    elsewhere(monkeypatch, "another card")
    entries = run(study_classification, tmp_path, *quick, "sparse, 256 tokens")["entries"]
    assert list(entries) == [*before, "sparse, 256 tokens"] and before.items() <= entries.items()
    assert entries["sparse, 256 tokens"]["environment"]["hardware"] == "another card"


@pytest.fixture(scope="module")
def documents():
    return sotu.Documents(sotu.tiny_speeches(), tiny.tokenizer())


def test_every_speech_is_asked_for_once_and_no_president_is_learned_from_too(documents):
    asked = []
    for seed in range(sotu.SPLITS):
        learned, test = documents.split(seed)
        assert not set(documents.presidents[learned]) & set(documents.presidents[test])
        asked += test.tolist()
    assert sorted(asked) == list(range(len(documents.found)))
    assert documents.split(0)[1].tolist() != documents.split(sotu.SPLITS)[1].tolist()


def test_rows_of_a_speech_are_its_text_from_the_beginning(documents):
    ends = documents.tokenizer("")["input_ids"]
    rows, places = documents.rows([5, 2], 32, 3)
    for place, i in enumerate([5, 2]):
        mine = [row for row, where in zip(rows, places, strict=True) if where == place]
        assert all([row["input_ids"][0], row["input_ids"][-1]] == ends for row in mine)
        assert sum((row["input_ids"][1:-1] for row in mine), []) == documents.ids[i][:90] and len(mine) == 3
        assert {row["labels"] for row in mine} == {documents.labels[i]}


def test_unknown_variants_are_told(capsys):
    with pytest.raises(SystemExit):
        study_classification.main(["--tiny", "--variants", "dense, 33 tokens"])
    assert "no variant dense, 33 tokens; there are dense, 32 tokens" in capsys.readouterr().err


def test_facts_are_repeated_at_the_end_of_a_row():
    tokenizer = tiny.tokenizer(causal=True)
    ids = torch.tensor(tokenizer("the whale sailed over waves " * 200, add_special_tokens=False).input_ids[:700])
    row = study_healing_long.facts_repeated({"input_ids": ids, "labels": ids}, tokenizer, 5, seed=1)
    assert len(row["input_ids"]) == 700 and torch.equal(row["input_ids"], row["labels"])
    said = tokenizer.decode(row["input_ids"])
    facts = re.findall(r"The number of \w+'s \w+ is \d{5}\.", said)
    assert len(facts) == 10 and sorted(facts[:5]) == sorted(facts[5:]) and len(set(facts)) == 5
    # the first five stand among the text, the others at its end
    assert said.index(facts[4]) < 0.7 * len(said) < said.rindex(facts[5]) and said.endswith(facts[9])


@pytest.mark.slow
def test_long_healing_asks_for_facts(tmp_path, monkeypatch):
    chosen = ["--variants", "dense", "a quarter dense, trained"]
    entries = run(study_healing_long, tmp_path, *chosen)["entries"]
    assert list(entries) == ["dense", "a quarter dense, trained"]
    assert entries["dense"]["layers"] is None and entries["a quarter dense, trained"]["layers"][1] == TINY.pattern
    assert all(
        0 <= entry["recall"]["recalled"] <= 1 and "passkey" in entry["recall"]["tasks"] for entry in entries.values()
    )
    # rows beyond what the model was made for are computed in pieces, and nothing is asked
    monkeypatch.setattr(study_healing_long, "MADE_FOR", 64)
    (tmp_path / "study.json").unlink()
    whole = run(study_healing_long, tmp_path, "--variants", "dense")["entries"]["dense"]
    assert whole["perplexity"] == pytest.approx(entries["dense"]["perplexity"], rel=1e-3) and "recall" not in whole


def test_who_is_taught_needs_who_teaches(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study_healing_long.parsed(["--variants", "a quarter dense, taught"])
    assert (
        "'a quarter dense, taught' learns from 'dense, trained'; give a folder as --teacher" in capsys.readouterr().err
    )
    given = ["--teacher", str(tmp_path / "teacher"), "--variants", "dense, trained", "a quarter dense, taught"]
    assert study_healing_long.parsed(given).teacher == tmp_path / "teacher"


@pytest.mark.slow
def test_the_dense_model_that_was_trained_alike_teaches(tmp_path):
    given = ["--teacher", str(tmp_path / "teacher"), "--variants", "dense, trained", "a quarter dense, taught"]
    entries = run(study_healing_long, tmp_path, *given)["entries"]
    assert list(entries) == ["dense, trained", "a quarter dense, taught"] and (tmp_path / "teacher").is_dir()
    assert entries["dense, trained"]["distillation"] is None and entries["a quarter dense, taught"]["distillation"]


@pytest.mark.slow
def test_a_choice_by_text_may_stand_alone(tmp_path):
    options = ["--work", str(tmp_path / "work"), "--seeds", "0", "--by", "layers", "--rank", "text", "--alone"]
    content = run(study_tuning, tmp_path, *options)
    assert content["settings"]["rank"] == "text"
    assert list(content["entries"]["seed 0, 0.5"]["candidates"]) == ["dense", "layers, chosen"]


@pytest.mark.slow
def test_tuning_is_checked_budget_by_budget(tmp_path):
    options = ["--work", str(tmp_path / "work"), "--batch", "4", "--seeds", "0"]
    entry = run(study_tuning, tmp_path, *options)["entries"]["seed 0, 0.5"]
    found = entry["candidates"]
    layers, heads, even, wider, none = (one["layers"] for name, one in found.items() if name != "dense")
    assert layers.count("dense") == even.count("dense") == 1 and none == ["window(7, 0) | first(2)"] * 2
    assert all("per_head" in text or text == none[0] or text == "dense" for text in heads) and wider[0] == wider[1]
    assert entry["questions"] == 4 and len(entry["ranking"]) == 2
    # what is written is not measured again
    assert run(study_tuning, tmp_path, *options)["entries"]["seed 0, 0.5"] == json.loads(json.dumps(entry))


def test_streaming_reads_a_text_in_every_way(tmp_path):
    content = run(study_streaming, tmp_path)
    entries, read = content["entries"], {"dense": 128}
    assert list(entries) == list(study_streaming.WAYS)
    assert all(entry["is_whole"] and entry["read"] == read.get(name, 512) for name, entry in entries.items())
    assert all(len(entry["by_position"]) == (5 if name == "dense" else 8) for name, entry in entries.items())
    # what is whole is not read again
    assert run(study_streaming, tmp_path)["entries"] == entries


@pytest.mark.slow
def test_indexers_are_trained_and_stand_beside_what_needs_no_training(tmp_path):
    content = run(study_indexer, tmp_path, "--steps", "30")
    entries = content["entries"]
    assert list(entries) == list(study_indexer.ENTRIES) and "recalled" not in entries["indexer, new"]
    assert entries["indexer, alone"]["mass"] >= entries["indexer, new"]["mass"]
    assert all(entries[name]["perplexity"] > 1 for name in entries if name != "indexer, new")
    # windows of so short a text hold nearly the same
    assert entries["dense"]["perplexity"] == pytest.approx(entries["indexer, all"]["perplexity"], rel=0.05)
