"""What a user should know before the result is used: said once by `convert`, and in the report, the dry run and the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from transformers import AutoModel

import sparse_hf
from sparse_hf.conversion import describe_conversion, report_text
from sparse_hf.conversion.card import write_card
from tests.models.families import dense_model
from tests.models.longformers import stock_model as longformer

UNMARKED, WEIGHTS = "marked() speaks of no token yet", "output_attentions of the dense configuration is left out"
SPARSE = "window(7, 7)"


def saved(head: str, folder: Path) -> Path:
    (longformer(head) if head.startswith("Longformer") else dense_model(head)).save_pretrained(folder)
    return folder


# head, pattern, ids, is nothing marked? Heads of Longformer that mark by themselves, or have ids, need no word
CASES = {
    "nothing marks": ("BertForMaskedLM", f"{SPARSE} | marked()", (), True),
    "keys alone": ("BertModel", f"{SPARSE} | marked_keys()", (), True),
    "ids mark": ("BertForMaskedLM", f"{SPARSE} | marked()", (1,), False),
    "no marks are asked for": ("BertForMaskedLM", f"{SPARSE} | first(1)", (), False),
    "Longformer's model": ("LongformerModel", None, (), True),
    "Longformer's language model": ("LongformerForMaskedLM", None, (), True),
    "Longformer's classifier marks": ("LongformerForSequenceClassification", None, (), False),
    "Longformer's answers mark": ("LongformerForQuestionAnswering", None, (), False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pattern_with_marks_and_nothing_marked(case, tmp_path, caplog):
    head, pattern, ids, unmarked = CASES[case]
    dense = saved(head, tmp_path / "dense")
    told = report_text(describe_conversion(dense, pattern, global_token_ids=ids))
    assert told.count(UNMARKED) == unmarked and UNMARKED not in caplog.text
    sparse_hf.convert(dense, tmp_path / "sparse", pattern, global_token_ids=ids, progress=False)
    assert caplog.text.count(UNMARKED) == unmarked
    assert (tmp_path / "sparse" / "conversion.txt").read_text().count(UNMARKED) == unmarked
    assert write_card(tmp_path / "sparse").read_text().count(UNMARKED) == unmarked


def test_a_card_without_a_conversion_says_it_too(tmp_path):
    sparse_hf.sparsify(dense_model("BertModel"), f"{SPARSE} | marked()").save_pretrained(tmp_path / "sparse")
    assert write_card(tmp_path / "sparse").read_text().count(UNMARKED) == 1


@pytest.mark.parametrize("head", ["BertModel", "LlamaForCausalLM", "T5EncoderModel", "BartModel", "DistilBertModel"])
def test_a_dense_configuration_that_wants_attention_weights(head, tmp_path, caplog):
    """Families with one stack and with two; what is converted loads, and gives weights where the reference is asked for."""
    folder = saved(head, tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_attentions": True}))
    layers = "decoder=window(7, 0)" if head in ("BartModel", "T5EncoderModel") else None
    assert WEIGHTS in report_text(describe_conversion(folder, SPARSE, layers=layers))
    sparse_hf.convert(folder, tmp_path / "sparse", SPARSE, layers=layers, progress=False)
    assert caplog.text.count(WEIGHTS) == 1
    assert not json.loads((tmp_path / "sparse" / "config.json").read_text()).get("output_attentions")
    model = AutoModel.from_pretrained(tmp_path / "sparse")
    assert not model.config.output_attentions
    reference = AutoModel.from_pretrained(tmp_path / "sparse", attn_implementation="sparse_reference")
    reference.config.output_attentions = True
    assert reference.config.output_attentions


def test_one_that_does_not_is_not_spoken_of(tmp_path, caplog):
    folder = saved("BertModel", tmp_path / "dense")
    sparse_hf.convert(folder, tmp_path / "sparse", SPARSE, progress=False)
    assert WEIGHTS not in caplog.text and WEIGHTS not in (tmp_path / "sparse" / "conversion.txt").read_text()


def test_a_model_in_memory_that_wants_attention_weights():
    dense = transformers.BertModel(transformers.BertConfig(**dense_model("BertModel").config.to_diff_dict()))
    dense.set_attn_implementation("eager")
    dense.config.output_attentions = True
    sparse = sparse_hf.sparsify(dense, SPARSE)
    assert not sparse.config.output_attentions and dense.config.output_attentions
