"""Every causal pattern of the table in every decoder family: what a cache holds and a graph computes is what one pass would say.

`test_static_graph.py` has each of them by itself; here are the pairs, which may meet in a way of their own.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf.streaming_cache import why_not_streamed
from tests.crosses import slow_but_for
from tests.models.families import dense_model, has_two_stacks, named_cache, one_head
from tests.models.test_parity import assert_as_near, in_double
from tests.models.test_static_graph import DECODERS, NO_GRAPH, graphs, has_end, how, prompt
from tests.table import PATTERNS

__all__ = ["graphs"]
HEADS = [head for head in one_head(generating=True) if not has_two_stacks(head)]
PAIRS = [(head, pattern) for head in HEADS for pattern in PATTERNS]
COMPILED = [pair for pair in PAIRS if pair[0] not in NO_GRAPH]
# each pattern in three families, each family under several patterns
SAMPLE = [
    (DECODERS[(n + shift) % len(DECODERS)], pattern) for n, pattern in enumerate(PATTERNS) for shift in (3, 8, 13)
]  # fmt: skip
FAST = [SAMPLE[13], SAMPLE[-2]]
# tokens of the prompt that are read at a time, those that are marked among the first; of a second question; of all texts at most
PIECE, QUESTION, LONGEST = 48, 5, 120


def made(head: str, pattern: str):
    """A model, and a batch whose first row is padded on the left, with marks where the pattern asks for them."""
    model, inputs = sparse_hf.sparsify(dense_model(head).eval(), pattern), prompt(length=70)
    if model.config.uses_marks:
        inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
        inputs["global_attention_mask"][:, [9, 40]] = 1
    return model, inputs


def caches(model, pattern: str) -> dict[str, dict]:
    """Arguments of `generate` by the kind of cache; MPT's configuration says that none is used."""
    found = {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=LONGEST)}
    if has_end(pattern) and why_not_streamed(model.config) is None:
        found["streaming"] = StreamingCache(model.config)
    return {kind: {"use_cache": True, **named_cache(model, cache)} for kind, cache in found.items()}


def conversation(model, inputs: dict, **given) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and logits of two answers. The first prompt is read in pieces where there is a cache."""
    found = []
    pieces = {} if given["use_cache"] is False else {"prefill_chunk_size": PIECE}
    for more in (pieces, {}):
        out = model.generate(**inputs, **how(return_dict_in_generate=True, output_logits=True, **given, **more))
        found.append((out.sequences, torch.stack(out.logits, 1)))
        inputs = {name: _longer(value, out.sequences, name) for name, value in inputs.items()}
    return found


def _longer(value: torch.Tensor, text: torch.Tensor, name: str) -> torch.Tensor:
    if name == "input_ids":
        return torch.cat((text, prompt(length=QUESTION)["input_ids"]), 1)
    new = text.shape[1] + QUESTION - value.shape[1]
    return torch.nn.functional.pad(value, (0, new), value=int(name == "attention_mask"))


@pytest.mark.parametrize(("head", "pattern"), slow_but_for(FAST, PAIRS))
def test_caches(head, pattern):
    model, inputs = made(head, pattern)
    for way in ({}, {"num_beams": 3}):
        right = model.generate(**inputs, **how(use_cache=False, **way))
        for kind, cache in caches(model, pattern).items():
            assert torch.equal(model.generate(**inputs, **how(**cache, **way)), right), (kind, way)


@pytest.mark.compiles
@pytest.mark.parametrize(("head", "pattern"), slow_but_for(SAMPLE, COMPILED, FAST))
def test_graphs(head, pattern, graphs):
    """No graph breaks, and both answers are of one graph."""
    config, found = graphs
    model, inputs = made(head, pattern)
    right = conversation(model, inputs, use_cache=False)
    exact = conversation(in_double(model), inputs, use_cache=False)
    ways = caches(model, pattern)
    del ways["dynamic"]
    for kind, cache in ways.items():
        before = len(found)
        got = conversation(model, inputs, compile_config=config, **cache)
        assert len(found) == before + 1, kind
        for ours, plain, wanted in zip(got, right, exact, strict=True):
            assert torch.equal(ours[0], plain[0]) and torch.equal(plain[0], wanted[0]), kind
            assert_as_near(ours[1], plain[1], wanted[1], f"logits with a {kind} cache")


def test_every_pattern_and_every_family_is_compiled_in_ci():
    assert {pattern for _, pattern in SAMPLE} == set(PATTERNS) and {head for head, _ in SAMPLE} == set(DECODERS)
    assert set(SAMPLE) <= set(COMPILED) and len(COMPILED) == len(PATTERNS) * len(DECODERS)
