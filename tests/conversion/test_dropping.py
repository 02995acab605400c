"""What `export` leaves out by name: which pairs that takes, and what it costs on a text."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import transformers

import sparse_hf
from sparse_hf.conversion.export import export
from sparse_hf.conversion.export import logger as export_logger
from tests.models.families import dense_model
from tests.models.test_libraries import words

PATTERN, SINKS = "window(9, 0) | first(4)", "first(4)"


@pytest.fixture(autouse=True)
def _warnings_are_heard(monkeypatch):
    monkeypatch.setattr(export_logger, "propagate", True)
    monkeypatch.setattr(export_logger, "disabled", False)


def saved(folder: Path, head: str = "LlamaForCausalLM", pattern: str = PATTERN, **more) -> Path:
    sparse_hf.sparsify(dense_model(head), pattern, **more).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    numbers = torch.randint(4, 90, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    return tmp_path / "text.txt"


def perplexity(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids).logits
    return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


def test_a_decoder_without_its_sinks(tmp_path, text, caplog):
    folder = saved(tmp_path / "sparse")
    with pytest.raises(ValueError, match=re.escape("leave it out with drop='first(4)' (--drop 'first(4)')")):
        export(folder, tmp_path / "native", "native", progress=False)
    export(folder, tmp_path / "native", "native", drop=SINKS, text=text, progress=False)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(stock).__name__ == "MistralForCausalLM" and stock.config.sliding_window == 10
    wanted = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(9, 0)")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, wanted(ids).logits, atol=1e-5, rtol=1e-4)
    # of a query's keys 10 are in the window and 4 are sinks, but for the first queries
    share = 1 - (4096 * 10 - 45) / (4096 * 14 - 45 - 10 - 4 * 10)
    said = next(record.message for record in caplog.records if "is dropped in 2 of 2 layers" in record.message)
    assert float(re.search(r"([\d.]+) % of their pairs at 4,096 tokens", said)[1]) == pytest.approx(
        100 * share, rel=0.05
    )
    before = perplexity(sparse_hf.sparsify(dense_model("LlamaForCausalLM"), PATTERN), ids)
    assert f"perplexity on {ids.shape[1]} tokens of text.txt: {before:.4g} with what is dropped, " in caplog.text
    assert f" {perplexity(stock, ids):.4g} without" in caplog.text


def test_an_encoder_without_its_global_token(tmp_path, text, caplog):
    """Layers that slide in the dense family too see the first token no farther than they slide."""
    layers = {"0": "window(None, None)"}
    folder = saved(tmp_path / "sparse", "ModernBertForMaskedLM", "window(16, 16) | first(1)", layers=layers)
    export(folder, tmp_path / "native", "native", drop="first(1)", text=text, progress=False)
    assert "is dropped in 1 of 2 layers, 0 % of their pairs" in caplog.text
    assert "tokens of text.txt with what is dropped and without: cosine 1.0000 in the mean" in caplog.text


def test_what_drops_nothing_is_refused(tmp_path, text):
    folder = saved(tmp_path / "sparse")
    with pytest.raises(ValueError, match=re.escape("drop is first(3), which is a part of no layer's pattern")):
        export(folder, tmp_path / "native", "native", drop="first(3)", progress=False)
    with pytest.raises(ValueError, match="to is 'dense', which drops all patterns"):
        export(folder, tmp_path / "native", "dense", drop=SINKS, progress=False)
    with pytest.raises(ValueError, match="and nothing is dropped; give drop"):
        export(folder, tmp_path / "native", "native", text=text, progress=False)
    assert not (tmp_path / "native").exists()
