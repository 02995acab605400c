"""Pipelines find marked tokens by the ids that the configuration names."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import sparse_hf
from tests.models.families import VOCABULARY, dense_model


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", unk_token="w1")


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
