"""Every causal pattern of the table in every decoder family: what a cache holds and a graph computes is what one pass would say.

`test_static_graph.py` has each of them by itself; here are the pairs, which may meet in a way of their own.
"""

from __future__ import annotations

import pytest
import torch

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf.streaming_cache import why_not_streamed
from tests.models.families import dense_model, has_two_stacks, named_cache, one_head
from tests.models.test_static_graph import DECODERS, graphs, has_end, how, prompt
from tests.table import PATTERNS

__all__ = ["graphs"]
HEADS = [head for head in one_head(generating=True) if not has_two_stacks(head)]
PAIRS = [(head, pattern) for head in HEADS for pattern in PATTERNS]
# each pattern in two families, each family under several patterns
COMPILED = [
    (DECODERS[(n + shift) % len(DECODERS)], pattern) for n, pattern in enumerate(PATTERNS) for shift in (3, 3 + len(DECODERS) // 2)
]  # fmt: skip
FAST = (("GPT2LMHeadModel", PATTERNS[13]), ("Qwen3ForCausalLM", PATTERNS[-1]))


def pairs(found: list) -> list:
    return [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in found]


def made(head: str, pattern: str):
    """A model, and a batch whose first row is padded on the left, with marks where the pattern asks for them."""
    model, inputs = sparse_hf.sparsify(dense_model(head).eval(), pattern), prompt(length=70)
    if model.config.uses_marks:
        inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
        inputs["global_attention_mask"][:, [9, 40]] = 1
    return model, inputs


def caches(model, pattern: str) -> dict[str, dict]:
    """Arguments of `generate` by the kind of cache; MPT's configuration says that none is used."""
    found = {"dynamic": {"cache_implementation": "dynamic"}, "static": {"cache_implementation": "static"}}
    if has_end(pattern) and why_not_streamed(model.config) is None:
        found["streaming"] = named_cache(model, StreamingCache(model.config))
    return {kind: {"use_cache": True, **given} for kind, given in found.items()}


@pytest.mark.parametrize(("head", "pattern"), pairs(PAIRS))
def test_caches(head, pattern):
    model, inputs = made(head, pattern)
    right = model.generate(**inputs, **how(use_cache=False))
    for kind, cache in caches(model, pattern).items():
        assert torch.equal(model.generate(**inputs, **how(**cache)), right), kind


@pytest.mark.compiles
@pytest.mark.parametrize(("head", "pattern"), pairs(COMPILED))
def test_graphs(head, pattern, graphs):
    config, found = graphs
    model, inputs = made(head, pattern)
    right = model.generate(**inputs, **how(use_cache=False))
    ways = caches(model, pattern)
    del ways["dynamic"]
    for kind, cache in ways.items():
        before, got = len(found), model.generate(**inputs, **how(compile_config=config, **cache))
        assert torch.equal(got, right) and len(found) == before + 1, kind


def test_every_pattern_and_every_family_is_compiled():
    assert {pattern for _, pattern in COMPILED} == set(PATTERNS) and {head for head, _ in COMPILED} == set(DECODERS)
