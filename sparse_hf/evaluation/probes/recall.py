"""Recall of facts in long texts, by length and depth."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import ClassVar

from ..candidates import DENSE
from ..pieces import Finished, Found, Piece
from ..recall.ask import ask, reply_length
from ..recall.filler import Filler
from ..recall.tasks import Question, Task
from ..subject import Contender
from .base import Setup, of_contenders

# (task, length, depth) -> what was found there
_Cells = dict[tuple[str, int, float | None], list[Found]]


class Recall:
    """The share of facts that a decoder says when it is asked for them, over lengths and depths, and its loss on their tokens.

    Facts are hidden in the user's texts, at a tenth, half and nine tenths of the length by default.
    """

    name: ClassVar[str] = "recall"

    def why_not(self, setup: Setup) -> str | None:
        if setup.subject.kind != "decoder":
            return f"{type(setup.subject.dense.model).__name__} says nothing; recall asks models ForCausalLM"
        try:
            # that every question fits is known before the first is asked
            questions_of(setup)
        except ValueError as error:
            return str(error)
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        for i, batch in enumerate(_together(setup)):
            what = {"asked": [{**where, "question": question.digest} for where, question in batch]}
            yield from of_contenders(self.name, setup, _asked, [question for _, question in batch], what, (3, i))

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        cells: dict[str, _Cells] = defaultdict(lambda: defaultdict(list))
        for piece in finished:
            for asked, found in zip(piece.what["asked"], piece.found["answered"], strict=True):
                cells[piece.candidate][asked["task"], asked["length"], asked["depth"]].append(found)
        return {
            "lengths": sorted({length for of_one in cells.values() for _, length, _ in of_one}),
            "depths": list(setup.settings.depths),
            "left_out": tasks_of(setup)[1],
            "candidates": {name: _summed(of_candidate) for name, of_candidate in cells.items()},
        }


def tasks_of(setup: Setup) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks that are asked, and why others are not, as `prepare` read them."""
    return setup.memo["tasks"]


def questions_of(setup: Setup) -> list[tuple[dict, Question]]:
    """Every question, with its task, length and depth."""
    if "questions" not in setup.memo:
        setup.memo["questions"] = list(_drawn(setup))
    return setup.memo["questions"]


def _together(setup: Setup) -> Iterator[list[tuple[dict, Question]]]:
    """The questions that are asked together: of one length, and with replies as long where that can be."""
    of_lengths: dict[int, list[tuple[dict, Question]]] = defaultdict(list)
    for where, question in questions_of(setup):
        of_lengths[where["length"]].append((where, question))
    # a table may have no row for what stands behind an answer that is over
    count = setup.settings.batch if setup.subject.limit is None else 1
    for found in of_lengths.values():
        found.sort(key=lambda entry: reply_length(setup.subject.tokenizer, entry[1]))
        yield from (found[at : at + count] for at in range(0, len(found), count))


def _drawn(setup: Setup) -> Iterator[tuple[dict, Question]]:
    """The questions, each drawn by its task, length and depth alone, whatever else is asked."""
    settings = setup.settings
    filler = Filler.of(setup.texts, setup.subject.tokenizer)
    for name, task in tasks_of(setup)[0].items():
        for length in settings.all_lengths:
            for depth in settings.depths if task.has_depth else (None,):
                for repeat in range(settings.repeats):
                    seed = f"{settings.seed} {name} {length} {depth} {repeat}"
                    question = _asked_within(task, filler, length, depth or 0.0, seed)
                    yield {"task": name, "length": length, "depth": depth, "repeat": repeat}, question


def _asked_within(task: Task, filler: Filler, length: int, depth: float, seed: str) -> Question:
    """A question that has room for its reply within the length, beyond which a model may have no positions."""
    question = task.ask(filler, length, depth, random.Random(seed))
    over = filler.count(question.prompt) + reply_length(filler.tokenizer, question) - length
    # the same draws give the same answers
    return question if over <= 0 else task.ask(filler, length - over, depth, random.Random(seed))


def _asked(setup: Setup, contender: Contender, questions: Sequence[Question]) -> Found:
    setup.passes.forget()
    # what answers behind the prompt
    answering = setup.subject.dense.model if contender.config.decode == DENSE else None
    found = ask(contender.model, setup.subject.tokenizer, questions, answering)
    return {"answered": [{"recalled": share, "loss": loss} for share, loss in found]}


def _summed(cells: _Cells) -> Found:
    """What a candidate recalls: of all cells, and of each, by task."""
    tasks: dict[str, list[Found]] = defaultdict(list)
    for (task, length, depth), found in cells.items():
        tasks[task].append({"length": length, "depth": depth, **_means(found)})
    return {**_means([cell for of_task in tasks.values() for cell in of_task]), "tasks": dict(tasks)}


def _means(found: Sequence[Found]) -> Found:
    return {key: sum(one[key] for one in found) / len(found) for key in ("recalled", "loss")}
