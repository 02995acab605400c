"""Questions of recall, by hand; replies are those of `generate`."""

from __future__ import annotations

import random

import pytest
import torch

from sparse_hf import evaluate, sparsify
from sparse_hf.evaluation import Settings
from sparse_hf.evaluation.recall import ask as ask_module
from sparse_hf.evaluation.recall.ask import SPARE, ask
from sparse_hf.evaluation.recall.filler import Filler
from sparse_hf.evaluation.recall.table import TASKS
from sparse_hf.evaluation.recall.tasks import COMMON, SHORT, InProse, Question
from sparse_hf.evaluation.texts import Text
from tests.evaluation.tiny import TEXT, tiny_model, tokenizer

LENGTH = 3000


@pytest.fixture(scope="module")
def filler() -> Filler:
    return Filler.of([Text("text", TEXT)], tokenizer())


def asked(name: str, filler: Filler, depth: float = 0.5, length: int = LENGTH, seed: int = 1) -> Question:
    return TASKS[name].ask(filler, length, depth, random.Random(seed))


@pytest.mark.parametrize("name", TASKS)
def test_a_question_fills_its_length_and_no_more(name, filler):
    tokens = filler.count(asked(name, filler).prompt)
    assert 0.93 * LENGTH < tokens <= LENGTH


@pytest.mark.parametrize("name", TASKS)
def test_a_question_is_drawn_by_its_seed_alone(name, filler):
    assert asked(name, filler) == asked(name, filler)
    assert asked(name, filler) != asked(name, filler, seed=2)


def test_a_model_has_positions_for_the_reply():
    settings = Settings(length=96, lengths=(800,), depths=(0.5,), progress=False)
    model = tiny_model("GPT2LMHeadModel", n_positions=800)
    options = {"tokenizer": tokenizer(), "settings": settings, "probes": ["recall", "cost"]}
    tasks = evaluate(model, "window(9, 0)", TEXT, **options).result["probes"]["recall"]["candidates"]["dense"]["tasks"]
    assert set(tasks) == set(SHORT)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", [name for name, task in SHORT.items() if task.has_depth])
def test_the_fact_stands_at_its_depth(name, depth, filler):
    question = asked(name, filler, depth)
    body = question.prompt[: question.prompt.rindex("\n\n")]
    # a chain of variables begins with the value that is asked for, which the question names
    fact = question.prompt.split(" hold ")[1][:5] if name == "variables" else question.answers[0]
    assert body.index(fact) / len(body) == pytest.approx(depth, abs=0.06)


def test_a_needle_is_one_among_others(filler):
    question = asked("needles", filler)
    name = question.prompt.rpartition("The code of the ")[2].removesuffix(" is")
    assert f"The code of the {name} is {question.answers[0]}." in question.prompt
    assert question.prompt.count("The code of the ") == 1 + 4


def test_all_values_of_a_key_are_asked_for(filler):
    question = asked("values", filler)
    assert len(question.answers) == 3 and all(f" is {value}." in question.prompt for value in question.answers)
    assert question.share(f" {question.answers[0]} and {question.answers[2]}.") == pytest.approx(2 / 3)


def test_variables_are_copied_from_each_other(filler):
    question = asked("variables", filler)
    first = question.prompt.split("The variables that hold ")[1].split(" are ")[1].split(" ")[0]
    chain = [first, *question.answers]
    assert f"Variable {first} is set to " in question.prompt
    for before, after in zip(chain, chain[1:], strict=False):
        assert f"Variable {after} is a copy of variable {before}." in question.prompt


def test_pairs_name_the_key_that_is_asked_for_once(filler):
    question = asked("pairs", filler)
    key = question.prompt.rpartition("key ")[2].removesuffix(": value")
    assert question.prompt.count(f"key {key}: value {question.answers[0]}\n") == 1


@pytest.mark.parametrize("length", [1000, 6000])
def test_common_words_are_the_most_frequent(length, filler):
    question = asked("words", filler, length=length)
    words = [line.partition(". ")[2] for line in question.prompt.split("\n\n")[1].splitlines()]
    by_number = sorted(set(words), key=words.count, reverse=True)
    assert set(by_number[:COMMON]) == set(question.answers)
    assert words.count(by_number[COMMON - 1]) > words.count(by_number[COMMON])


def test_too_short_a_text_is_refused(filler):
    for name in TASKS:
        with pytest.raises(ValueError, match=rf"facts of {name} alone take \d+ tokens, and \d+ are asked about"):
            asked(name, filler, length=64)


def test_share_is_that_of_the_answers_within_the_reply():
    question = Question("?", ("alpha", "12", "Beta"))
    assert question.share("The words are ALPHA, beta.") == pytest.approx(2 / 3)
    assert question.share("") == 0 and question.share("alpha12beta") == 1


@torch.no_grad()
@pytest.mark.parametrize("right", [0, 2, 4])
def test_a_reply_is_that_of_generate(right):
    dense, tokens = tiny_model(), tokenizer()
    model = sparsify(dense, "window(20, 0) | first(2)")
    prompt = TEXT[:150]
    ids = torch.tensor([tokens(prompt)["input_ids"]])
    said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    # what the model says begins the answer, and then it does not
    own = tokens.decode(said[:right])
    for answer in (own or "Q", f"{own}#####"):
        question = Question(prompt, (answer,))
        ((share, loss),) = ask(model, tokens, [question])
        wanted = tokens(f" {answer}")["input_ids"]
        greedy = model.generate(ids, max_new_tokens=len(wanted) + SPARE, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        assert share == question.share(tokens.decode(greedy))
        whole = torch.tensor([[*ids[0].tolist(), *wanted]])
        logits = model(whole).logits[0, ids.shape[1] - 1 : -1]
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted))), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("head", ["LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM"])
@pytest.mark.parametrize("pattern", ["window(None, 0)", "window(20, 0) | first(2)"])
def test_questions_that_are_asked_together_are_answered_as_alone(head, pattern):
    model, tokens = sparsify(tiny_model(head), pattern).eval(), tokenizer()
    prompts = [TEXT[:150], TEXT[7:90], TEXT[20:170], TEXT[3:100]]
    questions = []
    for number, prompt in enumerate(prompts):
        said = model.generate(**tokens(prompt, return_tensors="pt"), max_new_tokens=4, do_sample=False, pad_token_id=0)[
            0, -4:
        ]
        # one is answered word for word, others as far as two tokens or not at all
        own = tokens.decode(said[: 2 * number]) if number < 3 else ""
        questions.append(Question(prompt, (own or "Q",), wording=own or None, reply=9 + number))
    together = ask(model, tokens, questions)
    assert together == [pytest.approx(one) for question in questions for one in ask(model, tokens, [question])]
    assert {share for share, _ in together} == {0.0, 1.0}


@torch.no_grad()
def test_a_candidate_that_decodes_densely_answers_as_generate_does(monkeypatch):
    dense, tokens = tiny_model(), tokenizer()
    model = sparsify(dense, "window(20, 0) | first(2)", decode="dense").eval()
    ids = torch.tensor([tokens(TEXT[:150])["input_ids"]])
    said = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    # the answer is what generate says, word for word, so that nothing else is looked for
    monkeypatch.setattr(ask_module, "answer_tokens", lambda tokenizer, question: said[:4].tolist())
    question = Question(TEXT[:150], ("?",))
    answering = sparsify(dense, "window(None, None)").eval()
    ((share, loss),) = ask(model, tokens, [question], answering)
    assert share == 1.0 and loss != ask(model, tokens, [question])[0][1]
    monkeypatch.undo()
    settings = Settings(length=96, lengths=(260,), depths=(0.0,), tasks=("passkey",), progress=False)
    candidates = ["sparse: window(20, 0)", "dense behind: window(20, 0); decode=dense"]
    options = {"tokenizer": tokens, "settings": settings, "probes": ["recall"]}
    found = evaluate(dense, candidates, TEXT, **options).result["probes"]["recall"]["candidates"]
    assert found["sparse"]["loss"] != found["dense behind"]["loss"] != found["dense"]["loss"]


def test_prose_without_sentences_is_refused():
    with pytest.raises(ValueError, match="no sentence without digits"):
        Filler.of([Text("numbers", "1 2 3. 4 5 6.")], tokenizer())
    assert isinstance(SHORT["passkey"], InProse)
