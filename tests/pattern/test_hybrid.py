"""Dense layers among sliding ones."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import parse_layers, recipes, sparsify
from tests.models.families import dense_model


def dense_of(patterns) -> list[int]:
    return [layer for layer, pattern in enumerate(patterns) if str(pattern) == "window(None, None)"]


def test_every_nth_and_first_layers_are_dense():
    assert dense_of(recipes.hybrid(8)) == [3, 7]
    assert dense_of(recipes.hybrid(8, every=3, first=1)) == [0, 2, 5]
    assert dense_of(recipes.hybrid(4, every=None)) == [] and dense_of(recipes.hybrid(4, every=1)) == [0, 1, 2, 3]


def test_the_others_slide():
    assert recipes.hybrid(2, 16, 2, every=None) == [recipes.streaming(16, 2)] * 2
    assert recipes.hybrid(2, 16, sinks=0, every=2)[0] == recipes.sliding_window(16)


@pytest.mark.parametrize(
    ("options", "message"), [({"every": 0}, "every is 0"), ({"first": 5}, "the model has 4 layers")]
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        recipes.hybrid(4, **options)


@torch.no_grad()
def test_layers_take_it_and_it_decodes_densely():
    dense = dense_model("LlamaForCausalLM", num_hidden_layers=4).eval()
    layers = recipes.hybrid(4, 8, 2)
    assert parse_layers(layers, 4, "window(7, 0)") == layers
    model = sparsify(dense, recipes.streaming(8, 2), layers=layers, decode="dense").eval()
    ids = torch.randint(1, 90, (1, 40))
    # the first new token comes of the prompt, which is read by the pattern
    read = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]
    assert read == model(ids).logits[0, -1].argmax()
