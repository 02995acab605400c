"""The example of a long conversation: what it measures is what one pass over all of it gives."""

from __future__ import annotations

import json

import pytest
import torch

import sparse_hf
from examples import remember


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 64])
def test_answers_behind_a_cache_are_those_of_one_pass(window):
    dense, tokenizer = remember.opened(None, True)
    model = dense if window is None else sparse_hf.sparsify(dense, f"window({window - 1}, 0) | first(4)").eval()
    turns = remember.conversation(3, 2)
    assert [bool(turn.name) for turn in turns] == [True, False, False] * 3
    whole = tokenizer("".join(turn.text for turn in turns), add_special_tokens=False).input_ids
    # turns end in a line feed, where tokens end too
    assert whole == [i for turn in turns for i in tokenizer(turn.text, add_special_tokens=False).input_ids]
    for one in remember.remembered(model, tokenizer, turns, window):
        fact = next(turn for turn in turns if turn.name == one["name"])
        question = f"User: Which room has {fact.name}?\nAssistant: The room of {fact.name} is"
        begin = tokenizer(question, add_special_tokens=False).input_ids
        answer = tokenizer(f" {fact.number}", add_special_tokens=False).input_ids
        logits = model(torch.tensor([[*whole, *begin, *answer]])).logits[0, -len(answer) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        assert one["loss"] == pytest.approx(float(loss), rel=1e-3)


def test_it_runs_in_small(tmp_path):
    out, picture = tmp_path / "remember.json", tmp_path / "remember.png"
    arguments = [
        "--tiny",
        "--window",
        "64",
        "--facts",
        "3",
        "--between",
        "2",
        "--layers",
        "1=dense",
        "--out",
        str(out),
        "--plot",
        str(picture),
    ]
    content = remember.main(arguments)
    assert json.loads(out.read_text()) == content and picture.stat().st_size > 5_000
    distances = [one["distance"] for one in content["results"]["dense"]]
    assert distances == sorted(distances, reverse=True) and list(content["results"]) == [
        "dense",
        "last 64",
        "last 64, first 4",
        "last 64, first 4, some layers dense",
    ]
