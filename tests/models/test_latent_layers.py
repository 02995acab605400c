"""Layers whose heads share latents, against the keys and values that they would make of them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
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


def test_a_layer_trains_on_latents(monkeypatch, request):
    ours = sparse_hf.sparsify(dense_model(HEADS[0])).to(DEVICE, torch.float16)
    ids = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    calls, grads = counted(monkeypatch), []
    for of_latents in (False, True):
        if of_latents:
            request.getfixturevalue("interpreted")
            monkeypatch.setattr(selection, "is_able", lambda device: False)
        ours.zero_grad()
        ours(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
        assert len(calls) == of_latents * ours.config.num_hidden_layers
        grads.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "model.layers.0.self_attn.kv_b_proj.weight" in grads[0]
    for name, wanted in grads[0].items():
        assert float((grads[1][name] - wanted).float().norm() / wanted.float().norm().clamp(min=1e-3)) < 2e-2, name


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "what",
    [
        "a CPU's dtype",
        "who learns",
        "a hook",
        "a backward hook",
        "a hook of all modules",
        "a forward of its own",
        "no weight",
    ],
)
def test_keys_and_values_are_made_where_somebody_needs_them(what, monkeypatch):
    monkeypatch.setattr(selection, "is_able", lambda device: False)
    dtype = torch.float32 if what == "a CPU's dtype" else torch.float16
    ours = sparse_hf.sparsify(dense_model(HEADS[0])).to(DEVICE, dtype)
    calls, ids = counted(monkeypatch), torch.randint(3, 97, (1, 12)).to(DEVICE)
    projections = [layer.self_attn.kv_b_proj for layer in ours.model.layers]
    seen = []
    for projection in projections:
        if what == "a hook":
            projection.register_forward_hook(lambda *_: seen.append(1))
        if what == "a backward hook":
            projection.register_full_backward_hook(lambda *_: seen.append(1))
        if what == "a forward of its own":
            projection.forward = lambda x, own=projection.forward: seen.append(1) or own(x)
    if what == "no weight":
        # as those of quantizers, which nobody can read
        for layer, projection in zip(ours.model.layers, projections, strict=True):
            layer.self_attn.kv_b_proj = torch.nn.Sequential(projection)
    if what == "who learns":
        with sparse_hf.indexer_losses(ours) as losses:
            ours(input_ids=ids, use_cache=False)
        assert float(losses.mean().detach()) > 0
    else:
        monkeypatch.setattr(latent, "why_not", latent.why_not if dtype == torch.float32 else lambda *_: None)
        of_all = nullcontext()
        if what == "a hook of all modules":
            of_all = register_module_forward_hook(lambda module, *_: seen.append(1) if module in projections else None)
        with of_all, torch.set_grad_enabled(what == "a backward hook"):
            logits = ours(input_ids=ids, use_cache=False).logits
        if what == "a backward hook":
            logits.float().sum().backward()
    assert not calls and len(seen) == (len(projections) if "hook" in what or what == "a forward of its own" else 0)
