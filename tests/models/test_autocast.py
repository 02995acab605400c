"""Mixed precision: a sparse model under autocast is as near to single precision as the dense one under autocast is."""

from __future__ import annotations

import copy

import pytest
import torch

import sparse_hf
from tests.crosses import sampled
from tests.models.families import dense_model, inputs, one_head


def answer_and_gradient(model, batch) -> dict[str, torch.Tensor]:
    outputs = model(**batch)
    answer = outputs[1] if "loss" in outputs else outputs[0]
    (outputs.loss if "loss" in outputs else answer.square().mean()).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"answer": answer.detach().double(), "gradient": grads.double()}


# the stock DeBERTa fills its scores with a number that overflows 16 bits
FAMILIES = [head for head in one_head() if head != "DebertaForMaskedLM"]


@pytest.mark.parametrize("head", sampled(FAMILIES[::3], FAMILIES))
def test_autocast_costs_what_it_costs_the_dense_model(head):
    """Rotary positions leave queries and keys in float32 beside values in bfloat16, of which SDPA is given one kind."""
    dense, batch = dense_model(head), inputs(head, "none")
    exact = answer_and_gradient(copy.deepcopy(dense), batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = answer_and_gradient(copy.deepcopy(dense), batch)
        ours = answer_and_gradient(sparse_hf.sparsify(dense, "window(None, None)"), batch)
    for name, wanted in exact.items():
        error, allowed = ((found[name] - wanted).norm() / wanted.norm() for found in (ours, rounded))
        assert error <= 2 * allowed < 1, (name, float(error), float(allowed))
