"""Answers made a few tokens at a time are the model's own."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparsify
from sparse_hf.evaluation import passes
from tests.evaluation.tiny import tiny_model

HEADS = (
    "LlamaForCausalLM", "Gemma2ForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM",
    "BertForMaskedLM", "ModernBertForMaskedLM", "DistilBertForMaskedLM", "BertForPreTraining",
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_chunks_of_answers_are_those_of_the_model(head, monkeypatch):
    monkeypatch.setattr(passes, "MAX_LOGITS", 37 * 260)
    longer = {} if head in ("GPT2LMHeadModel", "DistilBertForMaskedLM") else {"max_position_embeddings": 512}
    dense = tiny_model(head, **({"n_positions": 512} if head == "GPT2LMHeadModel" else longer))
    model = sparsify(dense, "window(10, 10)").eval()
    ids = torch.randint(5, 250, (1, 100))
    states = passes.read(model, ids)
    chunks = list(passes.answers(model, states.last))
    found = torch.cat([logits for _, logits in chunks])
    output = model(input_ids=ids)
    wanted = output["logits"] if "logits" in output else output["prediction_logits"]
    torch.testing.assert_close(found, wanted[0].float(), rtol=1e-5, atol=1e-5)
    assert [start for start, _ in chunks] == [0, 37, 74]
    # nothing of it stays
    assert not model.base_model._forward_hooks
    assert len(states.layers) == model.config.num_hidden_layers + 1


def test_some_tokens_are_compared_layer_by_layer():
    assert passes.compared_tokens(5).tolist() == [0, 1, 2, 3, 4]
    some = passes.compared_tokens(5000)
    assert len(some) == len(some.unique()) == passes.MAX_COMPARED and some[-1] == 4999
