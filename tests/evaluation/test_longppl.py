"""Perplexity of tokens that need the far past: losses are the stock model's, key tokens are chosen by hand."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import evaluate, sparsify
from sparse_hf.evaluation import Settings
from sparse_hf.evaluation.probes import longppl
from tests.evaluation.test_verdict import judged
from tests.evaluation.tiny import TEXT, tiny_model, tokenizer

LENGTH = 200
SETTINGS = Settings(length=LENGTH, progress=False)


def stock_losses(model, ids) -> torch.Tensor:
    """Of each token but the first."""
    logits = model(ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


@torch.no_grad()
@pytest.mark.parametrize(("short", "shared"), [(25, 6), (40, 40), (60, 1), (199, 3)])
def test_a_token_sees_a_short_past(short, shared):
    model = tiny_model()
    ids = torch.randint(5, 250, (LENGTH,))
    found = longppl.short_losses(sparsify(model, "window(500, 0)").eval(), ids, short, shared)
    assert len(found) == LENGTH - short
    for token in range(short, LENGTH):
        # groups of `shared` tokens begin at the token `short`, and have the `short` tokens before them
        begin = (token - short) // shared * shared
        own = stock_losses(model, ids[begin : token + 1])[-1]
        assert float(found[token - short]) == pytest.approx(float(own), abs=1e-4)


def test_key_tokens_by_hand():
    # the second falls too little, the third stays above the bound, the fifth is worse with the whole text
    assert longppl.key_tokens([5.0, 3.0, 9.0, 3.1, 0.5], [1.0, 1.1, 2.0, 1.0, 6.0]) == [0, 3]


@torch.no_grad()
def test_perplexity_is_that_of_the_key_tokens(monkeypatch):
    monkeypatch.setattr(longppl, "ALPHA", -0.001)
    monkeypatch.setattr(longppl, "BETA", 6.0)
    model, pattern = tiny_model(), "window(9, 0)"
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"][:LENGTH])
    first = LENGTH // 8
    dense = stock_losses(model, ids)[first - 1 :]
    sparse = stock_losses(sparsify(model, pattern).eval(), ids)[first - 1 :]
    short = longppl.short_losses(sparsify(model, "window(500, 0)").eval(), ids, first, LENGTH // 32)
    keys = ((short - dense > -0.001) & (dense < 6.0)).nonzero()[:, 0]
    found = evaluate(model, pattern, TEXT, probes=["longppl"], tokenizer=tokenizer(), settings=SETTINGS)
    result = found.result["probes"]["longppl"]
    assert 0 < len(keys) < LENGTH - first and abs(result["key_tokens"] - len(keys)) <= 1
    assert result["tokens"] == LENGTH - first and result["short"] == first
    for name, own in (("dense", dense), (pattern, sparse)):
        assert result["candidates"][name]["perplexity"] == pytest.approx(float(own[keys].mean().exp()), rel=0.01)
    assert "LongPPL" in str(found) and "tokens that need the far past" in str(found)


def test_texts_without_key_tokens_have_no_figure():
    found = evaluate(tiny_model(), "window(9, 0)", TEXT, probes=["longppl"], tokenizer=tokenizer(), settings=SETTINGS)
    result = found.result["probes"]["longppl"]
    assert result["key_tokens"] == 0 and result["candidates"]["dense"]["perplexity"] is None
    assert "LongPPL" not in str(found) and found.result["verdicts"][0]["verdict"] == "nothing measured"


@pytest.mark.parametrize(("own", "verdict"), [(2.2, "safe as it is"), (2.3, "heal first")])
def test_the_verdict_goes_by_it(own, verdict):
    candidates = {"dense": {"perplexity": 2.0}, "window(9, 0)": {"perplexity": own}}
    found = judged({"longppl": {"key_tokens": 12, "candidates": candidates}})
    assert found["verdict"] == verdict
    assert found["reasons"] == [f"perplexity of 12 tokens that need the far past {own:.2f}, dense 2.00"]


def test_an_encoder_cannot_be_asked():
    with pytest.raises(ValueError, match="longppl asks models ForCausalLM"):
        evaluate(
            tiny_model("BertModel"), "window(9, 9)", TEXT, probes=["longppl"], tokenizer=tokenizer(), settings=SETTINGS
        )
