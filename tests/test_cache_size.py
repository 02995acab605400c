"""What `sparse-hf info` says of a cache is what a cache of a true pass holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import sparse_hf
from sparse_hf.cli.cache_size import cache_size
from sparse_hf.cli.info import info_lines, read_info
from sparse_hf.conversion.check import meta_model
from tests.models import families, indexers
from tests.models.families import named_cache

LENGTH = 96
# which asks for numbers in the middle of a pass
UNKNOWN = "Qwen4ExpForCausalLM"
CASES = [
    *((families, head, "window(7, 0) | first(2)") for head in families.one_head(generating=True) if families.is_decoder(head)),
    (families, "LlamaForCausalLM", "topk(3, 'indexer')"),
    (families, "Gemma3ForCausalLM", "topk(3, 'indexer')"),
    *((indexers, head, None) for head in indexers.heads("ForCausalLM")),
]  # fmt: skip


def held(cache) -> int:
    """Bytes of all that the layers of a cache have."""
    found = [value for layer in cache.layers for value in vars(layer).values()]
    found += [one for value in found if isinstance(value, dict) for one in value.values()]
    return sum(one.nbytes for one in found if isinstance(one, torch.Tensor) and one.is_floating_point())


@pytest.mark.parametrize(("room", "head", "pattern"), CASES)
def test_the_bytes_of_a_cache_are_those_of_a_pass(room, head, pattern):
    model = sparse_hf.sparsify(room.dense_model(head), pattern).eval()
    family = sparse_hf.family_of(model.config.model_type)
    found = cache_size(model.config, family, meta_model(family, model.config.to_dict()), LENGTH)
    if head == UNKNOWN:
        assert found["bytes"] is None
        return
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, LENGTH)), **named_cache(model, cache))
    assert found["bytes"] == held(cache) and found["bytes_per_token"] == round(found["bytes"] / LENGTH)


@pytest.mark.parametrize("head", [head for head in indexers.one_head() if head.endswith("ForCausalLM")])
def test_info_of_families_that_choose_keys(head, tmp_path):
    sparse_hf.sparsify(indexers.dense_model(head)).save_pretrained(tmp_path)
    lines = list(info_lines(read_info(str(tmp_path), LENGTH)))
    told = "not counted" if head == UNKNOWN else "for all keys"
    assert any(line.startswith("cache of a row") and told in line for line in lines)
