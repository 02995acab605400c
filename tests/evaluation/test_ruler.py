"""RULER's thirteen tasks: what they ask is counted in their own prompts, and cases are worked by hand."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest

from sparse_hf import evaluate
from sparse_hf.evaluation import Settings
from sparse_hf.evaluation.probes import recall
from sparse_hf.evaluation.recall.documents import Documents
from sparse_hf.evaluation.recall.filler import Filler
from sparse_hf.evaluation.recall.ruler import NOISE, RULER, Answer, counts
from sparse_hf.evaluation.recall.table import GROUPS, choose_tasks
from sparse_hf.evaluation.recall.tasks import Question
from sparse_hf.evaluation.texts import Text
from tests.evaluation.tiny import TEXT, tiny_model, tokenizer

LENGTH = 6000
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORD, NUMBER = r"[a-z]+-[a-z]+", r"\d{7}"
# haystack, key, value, keys, values, queries, as RULER's table of tasks has them
NEEDLES = {
    "niah_single_1": (NOISE, WORD, NUMBER, 1, 1, 1),
    "niah_single_2": (TEXT[:40], WORD, NUMBER, 1, 1, 1),
    "niah_single_3": (TEXT[:40], WORD, UUID, 1, 1, 1),
    "niah_multikey_1": (TEXT[:40], WORD, NUMBER, 4, 1, 1),
    "niah_multikey_2": (None, WORD, NUMBER, None, 1, 1),
    "niah_multikey_3": (None, UUID, UUID, None, 1, 1),
    "niah_multivalue": (TEXT[:40], WORD, NUMBER, 1, 4, 1),
    "niah_multiquery": (TEXT[:40], WORD, NUMBER, 4, 1, 4),
}
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The mill at Thorn was built by Ada Reed.",
                    "qas": [
                        {
                            "question": "Who built the mill?",
                            "answers": [{"text": "Ada Reed"}, {"text": "Reed"}],
                            "is_impossible": False,
                        },
                        {"question": "Who burnt it?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Thorn has a church and two wells.", "qas": []},
            ]
        },
        {"paragraphs": [{"context": f"Town {i} lies by a lake, and has a market.", "qas": []} for i in range(200)]},
    ]
}
HOTPOT = [
    {
        "question": f"Which is older, A{i} or B{i}?",
        "answer": f"A{i}",
        "context": [[f"{letter}{i}", ["It is a town.", f" It is in county {i}."]] for letter in "ABCD"],
    }
    for i in range(3)
]


@pytest.fixture(scope="module")
def filler() -> Filler:
    return Filler.of([Text("text", TEXT)], tokenizer())


def asked(name: str, filler: Filler, depth: float = 0.5, length: int = LENGTH, seed: int = 1) -> Question:
    return RULER[name].ask(filler, length, depth, random.Random(seed))


def body(question: Question) -> str:
    """The haystack: what stands between the first line and the question."""
    return question.prompt.partition("\n")[2].rpartition("\n")[0]


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_those_of_the_table(name, filler):
    haystack, key, value, keys, values, queries = NEEDLES[name]
    question = asked(name, filler)
    found = re.findall(rf"A secret \w+ of ({key}) is ({value})\.", body(question))
    wanted = Counter(key for key, _ in found)
    if keys is None:
        # the haystack consists of needles
        assert len(wanted) > 40 and all(
            re.fullmatch(rf"A secret \w+ of {key} is {value}\.", line) for line in body(question).split("\n")
        )
    else:
        assert len(wanted) == keys and set(wanted.values()) == {values} and haystack in question.prompt
    queried = re.findall(key, question.prompt.rpartition("\n")[2].rpartition("given for")[2])
    assert len(queried) == queries and len(set(queried)) == queries
    assert question.answers == tuple(v for q in queried for v in question.answers if (q, v) in found)
    assert len(question.answers) == queries * values and not question.any_of
    # the values asked for are said once each, and no other needle has a queried key
    assert [wanted[q] for q in queried] == [values] * queries
    # one is asked for in the singular
    assert ("Which secret numbers are" in question.prompt) is (value == NUMBER and queries * values > 1)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", NEEDLES)
def test_the_needle_stands_at_its_depth(name, depth, filler):
    question = asked(name, filler, depth)
    text = body(question)
    places = [text.index(answer) / len(text) for answer in question.answers]
    assert any(place == pytest.approx(depth, abs=0.06) for place in places)


def test_noise_stands_on_lines_and_prose_does_not(filler):
    lines = body(asked("niah_single_1", filler)).split("\n")
    assert Counter(lines)[NOISE] == len(lines) - 1
    assert "\n" not in body(asked("niah_single_2", filler))


@pytest.mark.parametrize("length", [1300, LENGTH])
def test_a_chain_is_copied_in_the_order_of_the_text(length, filler):
    question = asked("vt", filler, length=length)
    example, text = question.prompt.split("\n\nThe text below")
    value = text.split("have the value ")[1][:5]
    statements = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", text)
    assert statements[0] == (question.answers[0], value)
    assert statements[1:] == [(b, a) for a, b in zip(question.answers, question.answers[1:], strict=False)]
    assert len(question.answers) == 5 and f"the 5 variables that have the value {value} are:" in text
    # the example has names of three letters, and its answer
    names = re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(?:[A-Z]{3}|\d{5})", example)
    assert len(names) == 5 and example.endswith(f"are: {' '.join(names)}")
    assert question.wanted == f" {' '.join(question.answers)}"


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(4000, 6, 1, (20, 3, 1)), (9000, 30, 3, (40, 10, 3))]
)
def test_common_words_occur_as_often_as_they_should(length, often, seldom, example, filler):
    question = asked("cwe", filler, length=length)
    parts = [part.partition("\nQuestion:") for part in question.prompt.split("\nThe words of this")]
    lists = [Counter(re.findall(r"\d+\. ([a-z-]+)", listed)) for listed, _, _ in parts]
    assert set(question.answers) == {word for word, count in lists[1].items() if count == often}
    assert len(question.answers) == 10
    assert Counter(lists[0].values()) == {example[1]: 10, example[2]: example[0] - 10}
    assert set(lists[1].values()) == {often, seldom}
    # behind the example's question stands its answer, which is numbered as the answer is to be
    answer = parts[0][2].split("often are:")[1]
    assert {word: lists[0][word] for word in re.findall(r" \d+\. ([a-z-]+)", answer)} == {
        word: count for word, count in lists[0].items() if count == example[1]
    }
    assert re.findall(r"(\d+)\. ", parts[1][0]) == [str(i) for i in range(1, lists[1].total() + 1)]


def test_coded_words_fall_with_the_square_of_their_rank(filler):
    question = asked("fwe", filler)
    text = question.prompt.split("most often. ")[1].split("\n")[0].split()
    ranked = Counter(text).most_common()
    assert ranked[0][0] == "..." and [word for word, _ in ranked[1:4]] == list(question.answers)
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    first = ranked[0][1]
    for rank, (_, count) in enumerate(ranked[1:4], 2):
        assert count == pytest.approx(first / rank**2, abs=1)


def test_counts_by_hand():
    # 100 / zeta(2) is 60.79; a quarter, a ninth, a sixteenth and a 25th of it are 15.2, 6.75, 3.8 and 2.4
    assert counts(100, 5) == [60, 15, 6, 3, 2]


def write(folder, name, content):
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_documents_of_squad(tmp_path, filler):
    documents = Documents.read(write(tmp_path, "squad.json", SQUAD))
    (one,) = documents.asked
    assert (
        one.answers == ("Ada Reed", "Reed")
        and documents.texts[one.gold[0]] == SQUAD["data"][0]["paragraphs"][0]["context"]
    )
    question = Answer("qa_1", documents).ask(filler, 3000, 0.0, random.Random(0))
    shown = re.findall(r"Document (\d+):\n(.+)", question.prompt)
    assert [number for number, _ in shown] == [str(i) for i in range(1, len(shown) + 1)]
    texts = [text for _, text in shown]
    # the paragraph, the other of its article, and then others; none twice
    assert {documents.texts[0], documents.texts[1]} <= set(texts) and len(set(texts)) == len(texts) > 20
    assert question.prompt.endswith("Question: Who built the mill? Answer:")
    assert question.share("It was Reed.") == 1 and question.share("the mill") == 0 and question.wanted == " Ada Reed"


def test_documents_of_hotpot(tmp_path, filler):
    documents = Documents.read(write(tmp_path, "hotpot.json", HOTPOT))
    assert len(documents.texts) == 12 and documents.asked[1].gold == (4, 5, 6, 7)
    question = Answer("qa_2", documents).ask(filler, 1000, 0.0, random.Random(0))
    number = question.answers[0][1:]
    for letter in "ABCD":
        assert f"{letter}{number}\nIt is a town. It is in county {number}." in question.prompt


@pytest.mark.parametrize("content", [{"other": 1}, [{"question": "?"}], 5, {"data": []}])
def test_files_in_other_formats_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match=r"x\.json (is in neither format|has no question)"):
        Documents.read(write(tmp_path, "x.json", content))


def test_tasks_that_lack_their_file_are_named(tmp_path):
    squad = write(tmp_path, "squad.json", SQUAD)
    chosen, left_out = choose_tasks(["ruler"], [squad])
    assert [*chosen, *left_out] == [*RULER, "qa_1", "qa_2"] and set(GROUPS["ruler"]) == {*RULER, "qa_1", "qa_2"}
    assert "format of HotpotQA" in left_out["qa_2"]
    with pytest.raises(ValueError, match=r"qa_2 asks about documents; give a file in the format of HotpotQA"):
        choose_tasks(["qa_2"], [squad])
    with pytest.raises(ValueError, match="two files of SQuAD"):
        choose_tasks([], [squad, squad])
    with pytest.raises(FileNotFoundError, match="no file of questions"):
        choose_tasks([], [tmp_path / "absent.json"])
    assert "qa_1" in choose_tasks([], [squad])[0]


def test_an_evaluation_asks_them_and_says_what_it_left_out(tmp_path, monkeypatch):
    # answers are compared elsewhere
    monkeypatch.setattr(recall, "ask", lambda model, tokenizer, questions, answering: [(1.0, 0.0)] * len(questions))
    settings = Settings(length=96, lengths=(900,), depths=(0.5,), tasks=("niah_single_1", "qa_1", "ruler"), progress=False,
                        questions=(write(tmp_path, "squad.json", SQUAD),))  # fmt: skip
    short = Settings(length=96, lengths=(2500,), depths=(0.5,), tasks=("ruler",), progress=False)
    options = {"tokenizer": tokenizer(), "probes": ["recall"]}
    with pytest.raises(ValueError, match=r"probe recall: the facts of \w+ alone take"):
        evaluate(tiny_model(), "window(9, 0)", TEXT, settings=settings, **options)
    found = evaluate(tiny_model(max_position_embeddings=4096), "window(9, 0)", TEXT, settings=short, **options)
    assert set(found.result["probes"]["recall"]["candidates"]["window(9, 0)"]["tasks"]) == set(RULER)
    assert set(found.result["left_out"]) == {"qa_1", "qa_2"} and "not asked: qa_1" in str(found)
