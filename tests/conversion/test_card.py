"""Cards: metadata that hubs read, the pattern in numbers, and nothing overwritten by accident."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import sparse_hf
from sparse_hf.conversion.card import TASKS, write_card
from tests.models.families import dense_model

DENSE_CARD = "---\nlicense: mit\nbase_model: someone/bigger\nlanguage: en\n---\n# dense\n"


@pytest.fixture
def converted(tmp_path) -> Path:
    dense_model("LlamaForCausalLM", num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(DENSE_CARD)
    layers = {"0": "dense", "2": "window(4, 0)"}
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "window(9, 0) | first(1)", layers=layers, progress=False)
    return tmp_path / "sparse"


def test_card_of_a_conversion(converted):
    path = write_card(
        converted, base="owner/dense", results={"note": "On a laptop.", "perplexity": {"sparse": 3.25, "dense": 3}}
    )
    assert path == converted / "README.md" and (converted / "pattern.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "base_model": "owner/dense",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-attention", "long-context", "sparse_hf", "llama"],
    }
    assert "# sparse\n\n[owner/dense](https://huggingface.co/owner/dense) with sparse attention" in card.text
    assert (
        "import sparse_hf\n" in card.text
        and "trust_remote_code=True" in card.text
        and "AutoModelForCausalLM" in card.text
    )
    # 512 tokens: what is counted is the past
    assert "| 1, 3 | `window(9, 0) \\| first(1)` | 5,577 | 2.13% | 11 |" in card.text
    assert "| 0 | `window(None, None)` | 131,328 | 50.10% |" in card.text and "| 2 | `window(4, 0)` |" in card.text
    assert "![The pattern of layers 2](pattern.png)" in card.text
    assert "dense: llama -> SparseLlamaForCausalLM" in card.text and "rotary positions" in card.text
    assert "On a laptop.\n" in card.text and "| perplexity | 3.25 | 3 |" in card.text
    assert not list(converted.glob(".*"))


def test_license_and_base_come_from_the_cards_that_are_there(converted):
    write_card(converted, base=str(converted.parent / "dense"))
    data = ModelCard.load(converted / "README.md").data
    assert (data.license, data.base_model) == ("mit", "someone/bigger")
    # a second card keeps what the first one said
    write_card(converted, base="owner/dense", overwrite=True)
    data = ModelCard.load(converted / "README.md").data
    assert (data.license, data.base_model) == ("mit", "owner/dense")


def test_base_of_a_conversion_from_a_hub(converted):
    report = json.loads((converted / "conversion.json").read_text())
    (converted / "conversion.json").write_text(
        json.dumps({**report, "origin": {"license": "mit", "base_model": "owner/model"}})
    )
    write_card(converted)
    data = ModelCard.load(converted / "README.md").data
    assert (data.license, data.base_model) == ("mit", "owner/model")


def test_license_and_base_travel_with_the_conversion(converted):
    shutil.rmtree(converted.parent / "dense")
    write_card(converted)
    data = ModelCard.load(converted / "README.md").data
    assert (data.license, data.base_model) == ("mit", "someone/bigger")


@pytest.mark.parametrize("content", ["---\nlicense: [mit\n---\n", "---\n- mit\n---\n", "no metadata"])
def test_a_card_that_cannot_be_read_stops_no_conversion(content, tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(content)
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "window(9, 0)", progress=False)
    assert json.loads((tmp_path / "sparse" / "conversion.json").read_text())["origin"] == {}


def test_a_card_without_figures_says_so(converted):
    assert "Not evaluated: nobody has measured" in write_card(converted, overwrite=True).read_text()
    assert "Not evaluated" not in write_card(converted, results={"perplexity": 3.0}, overwrite=True).read_text()


def test_results_beside_the_checkpoint(converted):
    (converted / "results.json").write_text('{"seconds": 12345.6, "tokens": 4096}')
    text = write_card(converted).read_text()
    assert "| seconds | 12,346 |  |" in text and "| tokens | 4,096 |  |" in text


def test_without_matplotlib_the_picture_is_text(converted, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_card(converted).read_text()
    assert "█" in text and "pattern.png" not in text and not (converted / "pattern.png").exists()


@pytest.mark.parametrize(
    ("head", "auto", "rows"),
    [
        ("BertForMaskedLM", "AutoModelForMaskedLM", ["| 0-1 | `window(20, 20)` |"]),
        ("BertModel", "AutoModel", ["| 0-1 | `window(20, 20)` |"]),
        ("BertForNextSentencePrediction", "AutoModelForNextSentencePrediction", []),
        (
            "BartForConditionalGeneration", "AutoModelForSeq2SeqLM",
            ["| encoder 0-1 | `window(20, 20)` |", "| decoder 0-1 | `window(20, 20)` |"],
        ),
    ],
)  # fmt: skip
def test_card_of_a_saved_model(head, auto, rows, tmp_path):
    sparse_hf.sparsify(dense_model(head), "window(20, 20)").save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert f"model = {auto}.from_pretrained" in text and all(row in text for row in rows)
    assert ModelCard(text).data.pipeline_tag == TASKS.get(auto) and ModelCard(text).data.base_model is None


def test_mistakes_are_told(converted):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        write_card(converted / "nowhere")
    with pytest.raises(ValueError, match="is llama, which is dense"):
        write_card(converted.parent / "dense", overwrite=True)
    with pytest.raises(ValueError, match="base is './dense'; give a hub id"):
        write_card(converted, base="./dense")
    (converted / "README.md").write_text("by hand")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_card(converted)
    assert (converted / "README.md").read_text() == "by hand"
