"""Every pipeline for text runs a sparse model, from an object or a folder, and answers as with the dense one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.pipelines import SUPPORTED_TASKS

import sparse_hf
from tests.models.families import VOCABULARY, dense_model

# longer than the windows
WORDS = [f"w{5 + i * i % 80}" for i in range(120)]
TEXT = " ".join(WORDS)
MASKED = " ".join([*WORDS[:60], "w3", *WORDS[61:]])
ENTAILMENT = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@dataclass(frozen=True)
class Task:
    """A head that a pipeline runs, and what it is called with."""

    head: str
    text: str = TEXT
    call: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)


TASKS = {
    "feature-extraction": Task("BertModel"),
    "fill-mask": Task("BertForMaskedLM", MASKED),
    "text-classification": Task("BertForSequenceClassification", call={"top_k": None}),
    "text-generation": Task("LlamaForCausalLM", call=GREEDY),
    "token-classification": Task("BertForTokenClassification"),
    "zero-shot-classification": Task(
        "BertForSequenceClassification", call={"candidate_labels": ["w7", "w9"]}, config=ENTAILMENT
    ),
}
# pipelines for text whose models are no family of ours
ELSEWHERE = {"table-question-answering", "text-to-audio"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", unk_token="w1", mask_token="w3")


def answer(task: str, model, **options):
    return pipeline(task, model=model, **options)(TASKS[task].text, **TASKS[task].call)


def assert_alike(one, other):
    """The same words in the same order, and nearly the same numbers."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_alike(first, second)
    else:
        assert one == (other if isinstance(one, str | None) else pytest.approx(other, rel=1e-4, abs=1e-5))


def test_every_task_for_text_is_here():
    texts = {name for name, task in SUPPORTED_TASKS.items() if task["type"] == "text"}
    assert TASKS.keys() <= texts <= TASKS.keys() | ELSEWHERE


@pytest.mark.parametrize("task", TASKS)
def test_full_pattern_answers_as_the_dense_model(task, tmp_path):
    dense = dense_model(TASKS[task].head, **TASKS[task].config)
    wanted = answer(task, dense, tokenizer=tokenizer())
    sparse = sparse_hf.sparsify(dense, "window(None, None)")
    assert_alike(answer(task, sparse, tokenizer=tokenizer()), wanted)
    sparse.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert_alike(answer(task, str(tmp_path)), wanted)


@pytest.mark.parametrize("task", TASKS)
def test_sparse_pattern_answers_alike_from_object_and_folder(task, tmp_path):
    dense = dense_model(TASKS[task].head, **TASKS[task].config)
    sparse = sparse_hf.sparsify(dense, "window(4, 4) | first(1)")
    sparse.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    found = answer(task, sparse, tokenizer=tokenizer())
    assert_alike(answer(task, str(tmp_path)), found)
    # the pattern is in force
    assert str(found) != str(answer(task, dense, tokenizer=tokenizer()))


def test_a_batch_of_texts_answers_as_one_by_one():
    texts = [TEXT, " ".join(WORDS[:33])]
    sparse = sparse_hf.sparsify(dense_model("BertForSequenceClassification"), "window(4, 4) | first(1)")
    run = pipeline("text-classification", model=sparse, tokenizer=tokenizer(), top_k=None)
    assert_alike(run(texts, batch_size=2), [run([text])[0] for text in texts])


def test_text_classification_marks_by_token_id(tmp_path):
    dense = dense_model("BertForSequenceClassification")
    marked = sparse_hf.sparsify(dense, "window(2, 2) | marked()", global_token_ids=[7])
    marked.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    text = " ".join(f"w{2 + i % 8}" for i in range(60))
    found = pipeline("text-classification", model=str(tmp_path), top_k=None)(text)
    scores = {entry["label"]: entry["score"] for entry in (found[0] if isinstance(found[0], list) else found)}
    ids = tokenizer()(text, return_tensors="pt").input_ids
    plain = sparse_hf.sparsify(dense, "window(2, 2) | marked()")
    with torch.no_grad():
        by_mask = plain(ids, global_attention_mask=(ids == 7).long()).logits.softmax(-1)[0]
        unmarked = plain(ids).logits.softmax(-1)[0]
    assert abs(scores["LABEL_0"] - float(by_mask[0])) < 1e-5
    assert abs(float(unmarked[0] - by_mask[0])) > 1e-5
