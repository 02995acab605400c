"""Rotary angles that depend on the length of what is read: sparse models do as the dense ones, on both ends of a cache."""

from __future__ import annotations

import pytest
import torch

import sparse_hf
from tests.models.families import dense_model

FULL, ORIGINAL = "window(None, None)", 32
DYNAMIC = {"max_position_embeddings": ORIGINAL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}  # fmt: skip
LONGROPE = {
    "max_position_embeddings": 128, "original_max_position_embeddings": ORIGINAL, "sliding_window": None,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
}  # fmt: skip


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_dynamic_angles_beyond_the_limit(use_cache):
    dense = dense_model("LlamaForCausalLM", **DYNAMIC)
    made = [
        model.generate(ids(2, 24), max_new_tokens=24, do_sample=False, eos_token_id=None, use_cache=use_cache)
        for model in (dense, sparse_hf.sparsify(dense, FULL))
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("length", [30, 40])
def test_longrope_beside_a_longer_text(length):
    """The longest row of a batch decides which factors all rows have."""
    dense = dense_model("Phi3ForCausalLM", **LONGROPE)
    sparse, mask = sparse_hf.sparsify(dense, FULL), torch.ones(2, length, dtype=torch.long)
    mask[0, 20:] = 0
    with torch.no_grad():
        found, wanted = (model(ids(2, length), attention_mask=mask).logits for model in (sparse, dense))
        alone = sparse(ids(2, length)[:1, :20]).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found[:1, :20], alone, atol=1e-4) == (length <= ORIGINAL)


@pytest.mark.parametrize("implementation", ["sparse", "sparse_reference", "sparse_blockwise"])
def test_padding_in_double_precision(implementation):
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM").double(), FULL)
    sparse.set_attn_implementation(implementation)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :10] = 0
    with torch.no_grad():
        padded = sparse(ids(2, 40), attention_mask=mask).logits[:1, 10:]
        alone = sparse(ids(2, 40)[:1, 10:], position_ids=torch.arange(10, 40)[None]).logits
    torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)
