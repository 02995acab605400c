"""The example of a code base: what is asked for, and that answers behind a cache are those of one pass."""

from __future__ import annotations

import json

import pytest
import torch

import sparse_hf
from examples import find_definition
from examples.find_definition import asked, definitions, files
from examples.remember import opened

TEXT = """# file: a.py
def first(left: int, right: int) -> int:
    return left + right


def twice(value: int, other: int) -> int:
    return value


def short(a):
    return a


def long_one(
    value: int,
) -> int:
    return value


# file: b.py
def twice(value: int, other: int) -> str:
    return ""


def last(name: str, other: str) -> str:
    return name
"""


def test_signatures_that_are_on_one_line_once():
    found = definitions(TEXT)
    assert [(one.name, one.signature) for one in found] == [
        ("first", "left: int, right: int) -> int:"), ("last", "name: str, other: str) -> str:"),
    ]  # fmt: skip
    assert [TEXT[one.at :].partition("(")[0] for one in found] == ["def first", "def last"]


@torch.no_grad()
@pytest.mark.parametrize("pattern", [None, "window(63, 0) | first(4)"])
def test_answers_behind_a_cache_are_those_of_one_pass(pattern, monkeypatch):
    monkeypatch.setattr(find_definition, "PIECE", 50)
    dense, tokenizer = opened(None, True)
    model = dense if pattern is None else sparse_hf.sparsify(dense, pattern).eval()
    wanted = definitions(TEXT)
    found = asked(model, tokenizer, TEXT, wanted)
    whole = tokenizer(TEXT, add_special_tokens=False).input_ids
    for one, definition in zip(found, wanted, strict=True):
        begin = tokenizer(f"\n# {one['name']}, as it is defined above:\ndef {one['name']}(", add_special_tokens=False)
        answer = tokenizer(definition.signature, add_special_tokens=False).input_ids
        logits = model(torch.tensor([[*whole, *begin.input_ids, *answer]])).logits[0, -len(answer) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        assert one["loss"] == pytest.approx(float(loss), rel=1e-3)
        before = tokenizer(TEXT[: definition.at], add_special_tokens=False).input_ids
        assert one["distance"] == len(whole) - len(before)


def test_it_runs_in_small(tmp_path):
    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    given = [
        "--tiny",
        "--package",
        "email",
        "--length",
        "6000",
        "--window",
        "64",
        "--layers",
        "1=dense",
        "--every",
        "3",
    ]
    found = find_definition.main([*given, "--out", str(out), "--plot", str(picture)])
    assert json.loads(out.read_text()) == found and picture.stat().st_size > 5_000
    assert list(found["ways"]) == [
        "dense, without the code", "dense", "window and sinks", "every fourth layer dense", "chosen layers dense",
    ]  # fmt: skip
    rows = found["ways"]["dense"]["questions"]
    assert found["tokens"] <= 6000 and found["files"] > 1
    assert [row["distance"] for row in rows] == sorted((row["distance"] for row in rows), reverse=True)


def test_bad_input():
    with pytest.raises(ValueError, match="'no_such' is no package that can be imported here"):
        files("no_such")
    with pytest.raises(ValueError, match="is no package"):
        files("argparse")
    with pytest.raises(ValueError, match="1 tokens do not hold two files of sparse_hf.plan"):
        find_definition.main(["--tiny", "--length", "1"])
    with pytest.raises(ValueError, match="no function of the 2 files of json that 6,000 tokens hold"):
        find_definition.main(["--tiny", "--package", "json", "--length", "6000"])
