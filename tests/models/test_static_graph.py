"""`generate` with a static cache compiles the steps behind the prompt: one graph, for all lengths, layers and paddings."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, StaticCache

import sparse_hf
from tests.models.families import VOCABULARY, dense_model, has_two_stacks, named_cache, one_head, slow_but_for

pytestmark = pytest.mark.compiles
DECODERS = [head for head in one_head(generating=True) if not has_two_stacks(head)]
LLAMA, PATTERN = "LlamaForCausalLM", "window(7, 0) | first(2)"
PATTERNS = (
    "window(7, 0)", "stride(4) | window(2, 0)", "chunk(8)", "fixed(8, 2)", "window(3, 0) | marked()", "full()",
    "per_head(window(3, 0), window(9, 0), full(), first(3) | window(1, 0))",
)  # fmt: skip
NEW = 12


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, a graph each; a break or a second graph for another length would be an error or one more."""
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False)
    # `generate` compiles on GPUs alone, and leaves this door open to tests
    config._compile_all_devices = True
    return config, found


def prompt(rows: int = 2, length: int = 20) -> dict[str, torch.Tensor]:
    """Ids and a mask, of which the first row is padded on the left."""
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def how(**more) -> dict:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}


def compare(model, graphs, inputs, **more) -> None:
    config, found = graphs
    right = model.generate(**inputs, **how(use_cache=False, **more))
    got = model.generate(**inputs, **how(cache_implementation="static", compile_config=config, **more))
    assert torch.equal(got, right)
    assert len(found) == 1


@pytest.mark.parametrize(
    "head", slow_but_for((LLAMA, "GPT2LMHeadModel", "Gemma2ForCausalLM", "OPTForCausalLM"), DECODERS)
)
def test_families(head, graphs):
    compare(sparse_hf.sparsify(dense_model(head).eval(), PATTERN), graphs, prompt())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern, graphs):
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), pattern, global_token_ids=(9,) if "marked" in pattern else ())
    compare(model, graphs, prompt())


def test_layers_of_several_patterns_share_a_graph(graphs):
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN, layers={0: "dense"})
    compare(model, graphs, prompt())


def test_several_turns_with_one_cache(graphs):
    config, found = graphs
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    cache, text = StaticCache(config=model.config, max_cache_len=100), prompt()["input_ids"]
    for _ in range(3):
        right = model.generate(text, **how(use_cache=False))
        got = model.generate(text, **how(compile_config=config), **named_cache(model, cache))
        assert torch.equal(got, right)
        text = torch.cat((right, prompt(length=5)["input_ids"]), 1)
    assert len(found) == 1


def test_no_step_waits_for_what_the_mask_holds(graphs):
    """The mask is looked at once, before the prompt: an operator that waits for the device would cut CUDA graphs at each layer."""
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    config, found = graphs
    model.generate(**prompt(), **how(cache_implementation="static", compile_config=config))
    (graph,) = found
    operators = [node.target for node in graph.graph.nodes if "sparse_hf" in str(node.target)]
    assert operators and all(torch.Tag.cudagraph_unsafe not in operator.tags for operator in operators)


@pytest.mark.parametrize("padded", [slice(16, None), slice(6, 9)], ids=["behind", "inside"])
def test_a_prompt_with_padding_in_the_way_runs_without_compilation(padded, graphs):
    config, found = graphs
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    inputs = prompt()
    inputs["attention_mask"][1, padded] = 0
    right = model.generate(**inputs, **how(use_cache=False))
    assert torch.equal(model.generate(**inputs, **how(cache_implementation="static", compile_config=config)), right)
    assert not found
