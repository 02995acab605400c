"""Budgets of pairs, bytes of the cache and time: what fits, counted by hand and by a clock that the test holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from sparse_hf import Pattern, parse_layers, tune
from sparse_hf.evaluation import Budget, spending
from sparse_hf.evaluation.api import prepare
from sparse_hf.evaluation.candidates import Candidate
from sparse_hf.evaluation.choice import search_of
from sparse_hf.evaluation.heads import groups_of
from sparse_hf.evaluation.search import Unit
from sparse_hf.evaluation.spending import Spending
from sparse_hf.pattern import full
from tests.evaluation.tiny import QUICK, TEXT, tiny_model, tokenizer
from tests.test_cli import run as run_command

PATTERN, LAYERS, LENGTH = "window(9, 0) | first(2)", 5, 260


def made(budget: Budget, pattern: str = PATTERN, model: Any = None, length: int = LENGTH, folder=None, **options):
    """A budget spent on a model of five layers."""
    model = model or tiny_model(num_hidden_layers=LAYERS)
    setup = prepare(model, [Candidate("local", pattern)], TEXT, tokenizer(), QUICK)
    return Spending(search_of(setup, Pattern.parse(pattern), folder), budget, length, **options)


@dataclass
class Clock:
    """Seconds by the patterns of the layers: 1 for the rest of the model, `cost(pattern)` for each layer.

    `together` are added where some layers are dense and others are not.
    """

    cost: Callable[[str], float]
    together: float = 0.0
    seen: list[list[str]] = field(default_factory=list)

    def __call__(self, work: Any) -> float:
        patterns = work.args[0].config.layer_patterns("")
        work()
        self.seen.append(patterns)
        return 1.0 + sum(map(self.cost, patterns)) + (self.together if len(set(patterns)) > 1 else 0.0)


def of_dense_heads(pattern: str) -> float:
    """A second for a dense layer, a quarter for a local one, and more by each dense head of others."""
    heads = Pattern.parse(pattern).heads or (Pattern.parse(pattern),)
    return 0.25 + 0.75 * sum(head == full() for head in heads) / len(heads)


@pytest.mark.parametrize(
    ("budget", "pattern", "count"),
    [
        # of 10 tokens, 1 + 2 + 8 * 3 = 27 of 55 pairs: 5 * 27 + 28 n <= 0.75 * 5 * 55
        (Budget(share=0.75, of="pairs"), "window(2, 0)", 2),
        # 3 of 10 tokens, and the first: 5 * 4 + 6 n <= 0.64 * 5 * 10
        (Budget(share=0.64, of="cache"), "window(2, 0) | first(1)", 2),
        # all of a budget: 5 * 4 + 6 * 5 = 50, and a little less than that
        (Budget(share=0.88, of="cache"), "window(2, 0) | first(1)", 4),
        (Budget(share=0.87, of="cache"), "window(2, 0) | first(1)", 3),
    ],
)
def test_layers_by_hand(budget, pattern, count):
    found = made(budget, pattern, length=10)
    assert found.counts()[0] == count
    units = [Unit(layer) for layer in range(count)]
    assert found.told(units)["spent"] <= budget.share + 1e-9 < found.told([*units, Unit(count)])["spent"]


def test_heads_by_hand():
    found = made(Budget(share=0.6, of="pairs", by="heads"), "window(2, 0)", length=10)
    groups = groups_of(found.search.local.config)
    # 5 * 27 + 28 n / groups <= 0.6 * 5 * 55, so that n / groups <= 30 / 28
    assert found.counts() == (1, 30 * groups // 28)
    assert found.told([Unit(0, 0)])["dense"] == pytest.approx(1 / groups / LAYERS)


def test_pairs_of_layers_that_slide_by_themselves():
    model = tiny_model("Gemma3ForCausalLM", num_hidden_layers=2)
    found = made(Budget(share=0.99, of="pairs"), model=model)
    window, pairs = model.config.sliding_window, [(q, k) for q in range(LENGTH) for k in range(q + 1)]
    # the first layer of the dense model has the pairs of its own window and no more, and the pattern within it
    dense = sum(q - k < window for q, k in pairs) + len(pairs)
    local = sum((q - k < 10 or k < 2) * (1 + (q - k < window)) for q, k in pairs)
    assert found.search.layers == [1]
    assert found.told([])["spent"] == pytest.approx(local / dense)


def test_what_is_too_little_is_refused():
    message = r"budget of 0\.1 of the pairs leaves nothing .* window\(2, 0\) alone takes 0\.491 of them at 10 tokens"
    with pytest.raises(ValueError, match=message):
        made(Budget(share=0.1, of="pairs"), "window(2, 0)", length=10).counts()
    # 27 of 55 leave too little for a fifth of what is left
    with pytest.raises(ValueError, match="leaves nothing"):
        made(Budget(share=0.5, of="pairs"), "window(2, 0)", length=10).counts()
    with pytest.raises(ValueError, match="leaves nothing"):
        # a cache drops no key of a stride
        made(Budget(share=0.5, of="cache"), "stride(4)", length=10).counts()
    with pytest.raises(ValueError, match=r"a budget of 0\.9 is 2 dense layers, and 1 can be dense"):
        made(Budget(share=0.9), model=tiny_model("Gemma3ForCausalLM", num_hidden_layers=2)).counts()


def test_time_is_added_up_from_layers_of_each_kind():
    clock = Clock(of_dense_heads)
    found = made(Budget(share=0.625, of="time"), seconds=clock)
    # dense 1 + 5, local 1 + 5 / 4: 2.25 + 0.75 n <= 0.625 * 6
    assert found.counts() == (2, 0)
    told = found.told([Unit(1), Unit(3)])
    assert {name: told[name] for name in ("dense_s", "local_s", "chosen_s", "spent", "dense")} == {
        "dense_s": 6.0, "local_s": 2.25, "chosen_s": 3.75, "spent": 0.625, "dense": 0.4,
    }  # fmt: skip
    assert told["length"] == LENGTH and "threads: " in told["machine"]
    # all dense, none, and two layouts with two dense layers: that of `counts`, and that which was asked about
    assert [sum(text == str(full()) for text in patterns) for patterns in clock.seen] == [0, 5, 2, 2]


def test_layers_that_are_slower_together_are_fewer():
    found = made(Budget(share=0.625, of="time"), seconds=Clock(of_dense_heads, together=0.5))
    # two layers would take 3.75 by the sum, and take 4.25
    assert found.counts() == (1, 0)
    with pytest.raises(ValueError, match="leaves nothing"):
        made(Budget(share=0.625, of="time"), seconds=Clock(of_dense_heads, together=3.0)).counts()


def test_heads_fill_what_time_there_is():
    found = made(Budget(share=0.625, of="time", by="both"), seconds=Clock(of_dense_heads))
    groups = groups_of(found.search.local.config)
    assert groups > 1 and found.counts() == (2, 2 * groups)
    # a layer with some dense heads costs as much as one with all of them
    found = made(
        Budget(share=0.625, of="time", by="heads"), seconds=Clock(lambda text: 0.25 if text == PATTERN else 1.0)
    )
    chosen = list(found.search.copied)[: found.counts()[1]]
    following = list(found.search.copied)[found.counts()[1]]
    assert len({unit.layer for unit in chosen}) == 2 and following.layer not in {unit.layer for unit in chosen}


def test_a_pattern_that_takes_longer_is_refused():
    slow = Clock(lambda text: 1.0 if text == str(full()) else 1.4)
    message = r"0\.5 of the time leaves nothing .* alone takes 1\.333 of the 6\.00 s of the dense model \(.*\) at 260 tokens; .* longer"
    with pytest.raises(ValueError, match=message):
        made(Budget(share=0.5, of="time"), seconds=slow).counts()


def test_seconds_are_kept_with_their_machine(tmp_path, monkeypatch):
    budget, clock = Budget(share=0.625, of="time"), Clock(of_dense_heads)
    assert made(budget, folder=tmp_path, seconds=clock).counts() == (2, 0)
    measured = len(clock.seen)
    assert made(budget, folder=tmp_path, seconds=clock).counts() == (2, 0) and len(clock.seen) == measured
    other = {"hardware": "another", "threads": 1, "versions": {"torch": "2"}}
    monkeypatch.setattr(spending, "environment", lambda device: other)
    assert made(budget, folder=tmp_path, seconds=clock).counts() == (2, 0) and len(clock.seen) == 2 * measured


class FakeTimer:
    """In place of `Timer`: seconds by patterns, without a clock."""

    def __init__(self, device: Any, repeats: int, budget_s: float):
        self.seconds = Clock(of_dense_heads)


def test_tune_says_what_its_choice_takes(monkeypatch):
    monkeypatch.setattr(spending, "Timer", FakeTimer)
    found = tune(
        tiny_model(num_hidden_layers=LAYERS), PATTERN, TEXT, budget=Budget(share=0.625, of="time"), tokenizer=tokenizer(),
        settings=QUICK,
    )  # fmt: skip
    dense = [str(pattern) != PATTERN for pattern in parse_layers(found.layers, LAYERS, PATTERN)]
    assert sum(dense) == 2 == found.result["count"] and found.result["every_nth"] == "0=dense, 2=dense"
    words = " ".join(str(found).split())
    assert (
        "takes 62.5% of the time of the dense model, for a budget of 62.5%: 3.75 s of 6.00 s to read 260 tokens"
        in words
    )
    json.dumps(found.result)


def test_what_was_chosen_is_timed_as_a_whole():
    # the last layer takes a second more where it is dense and others are not
    class Uneven(Clock):
        def __call__(self, work: Any) -> float:
            found = super().__call__(work)
            is_mixed = len(set(self.seen[-1])) > 1
            return found + (1.0 if is_mixed and self.seen[-1][4] == str(full()) else 0.0)

    found = made(Budget(share=0.625, of="time"), seconds=Uneven(of_dense_heads))
    assert found.counts() == (2, 0)
    assert found.within([Unit(1), Unit(3)]) == [Unit(1), Unit(3)]
    assert found.within([Unit(1), Unit(4)]) == [Unit(1)]
    with pytest.raises(ValueError, match="leaves nothing"):
        found.within([Unit(4)])


def test_a_clock_that_is_real_measures_something():
    found = made(Budget(share=0.5, of="time"))
    told = found.told([Unit(0)])
    assert min(told["dense_s"], told["local_s"], told["chosen_s"]) > 0


def test_the_command_takes_time(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    done = run_command(
        "tune", str(tmp_path / "model"), "--pattern", PATTERN, "--text", str(tmp_path / "text.txt"), "--length", "96",
        "--lengths", "260", "--tasks", "passkey", "--budget", "0.000001", "--of", "time", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode and "a budget of 1e-06 of the time leaves nothing for dense layers" in done.stderr


def test_of_several_patterns_the_one_whose_answers_move_least():
    """Windows and sinks are chosen, too: each pattern gets the dense layers that the budget leaves beside it."""
    patterns, budget = (
        ["window(9, 0) | first(2)", "window(63, 0) | first(2)", "window(150, 0)"],
        Budget(share=0.6, of="pairs"),
    )
    found = tune(
        tiny_model(num_hidden_layers=LAYERS), patterns, TEXT, budget=budget, tokenizer=tokenizer(), settings=QUICK
    )
    refused, *fitting = found.result["patterns"]
    assert refused["pattern"] == "window(150, 0)" and "leaves nothing for dense layers" in refused["refused"]
    assert [one["pattern"] for one in fitting] == patterns[:2]
    # what is narrower leaves room for more
    counts = [sum(1 for one in parse_layers(f["layers"], LAYERS, f["pattern"]) if one == full()) for f in fitting]
    assert counts == [2, 1]
    best = min(fitting, key=lambda one: one["answers_moved"])
    assert (found.pattern, found.layers) == (best["pattern"], best["layers"])
    assert found.result["pattern"] == best["pattern"] and f"pattern={best['pattern']!r}" in str(found)
    alone = tune(
        tiny_model(num_hidden_layers=LAYERS),
        best["pattern"],
        TEXT,
        budget=budget,
        tokenizer=tokenizer(),
        settings=QUICK,
    )
    assert alone.layers == found.layers and "patterns" not in alone.result


@pytest.mark.parametrize(("patterns", "budget"), [([PATTERN, "window(3, 0)"], 0.5), ([], Budget(of="time"))])
def test_several_patterns_need_a_budget_that_counts_them(patterns, budget):
    with pytest.raises(
        ValueError, match=f"{len(patterns)} patterns are given; give one, or several with a budget that counts"
    ):
        tune(tiny_model(), patterns, TEXT, budget=budget, tokenizer=tokenizer(), settings=QUICK)


def test_where_no_pattern_fits_the_last_is_named():
    with pytest.raises(ValueError, match=r"leaves nothing for dense layers: window\(150, 0\) alone"):
        tune(tiny_model(), ["window(120, 0)", "window(150, 0)"], TEXT, budget=Budget(share=0.1, of="pairs"),
             tokenizer=tokenizer(), settings=QUICK)  # fmt: skip
