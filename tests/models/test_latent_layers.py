"""Layers whose heads share latents, against the keys and values that they would make of them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import sparse_hf
from sparse_hf.attention.chosen import selection
from sparse_hf.models.indexed import latent
from tests.attention.exactness import DEVICE
from tests.models.families import named_cache
from tests.models.indexers import dense_model

HEADS = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")


def counted(monkeypatch) -> list:
    """The calls over latents that are made from here on."""
    calls, attend = [], sparse_hf.models.hf.chosen_keys.attend_latent

    def counting(query, latents, chosen, **options):
        calls.append(query.shape)
        return attend(query, latents, chosen, **options)

    monkeypatch.setattr(sparse_hf.models.hf.chosen_keys, "attend_latent", counting)
    return calls


@pytest.mark.parametrize("head", HEADS)
def test_a_pass_over_latents_gives_the_same(head, monkeypatch, request):
    ours = sparse_hf.sparsify(dense_model(head)).to(DEVICE, torch.float16)
    ids = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    calls = counted(monkeypatch)
    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(latent, "why_not", lambda *_: "not now")
            wanted = ours(input_ids=ids, use_cache=False).logits
        assert not calls
        request.getfixturevalue("interpreted")
        # the interpreter takes long to choose
        monkeypatch.setattr(selection, "is_able", lambda device: False)
        found = ours(input_ids=ids, use_cache=False).logits
        assert len(calls) == ours.config.num_hidden_layers
        # a family whose cache holds keys and values makes them
        cache = DynamicCache(config=ours.config)
        ours(input_ids=ids[:, :-1], **named_cache(ours, cache))
        last = ours(input_ids=ids[:, -1:], **named_cache(ours, cache)).logits
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(last[:, 0], wanted[:, -1], rtol=2e-2, atol=2e-2)


def test_a_layer_that_trains_makes_keys_and_values(monkeypatch):
    ours = sparse_hf.sparsify(dense_model(HEADS[0]))
    calls, ids = counted(monkeypatch), torch.randint(3, 97, (1, 30))
    ours(input_ids=ids, labels=ids).loss.backward()
    assert not calls and ours.model.layers[0].self_attn.kv_b_proj.weight.grad.any()
