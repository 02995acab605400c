"""`generate_batch` of Transformers: requests side by side in one row, each of which gets the tokens that it gets alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import sparse_hf
from tests.models.families import VOCABULARY, dense_model
from tests.models.test_derived import COMMON
from tests.models.test_derived import dense_model as derived_model

LLAMA, PATTERN = "LlamaForCausalLM", "window(7, 0) | first(2)"
IS_TAKEN = "auto_switch_to_flash" in inspect.signature(ContinuousBatchingManager.switch_to_cb_friendly_attn).parameters
needs_pages = pytest.mark.skipif(not IS_TAKEN, reason="this Transformers keeps pages to its own attention")
LENGTHS = (3, 20, 41, 1, 12)
HOW = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def in_batch(model, **more) -> list[list[int]]:
    given = ContinuousBatchingConfig(block_size=8, num_blocks=64, max_batch_tokens=32)
    how = GenerationConfig(**HOW, eos_token_id=-1)
    results = model.generate_batch(prompts(), generation_config=how, continuous_batching_config=given, **more)
    assert not any(result.error for result in results.values())
    return [results[name].generated_tokens for name in sorted(results, key=lambda name: int(name.split("_")[-1]))]


def alone(model) -> list[list[int]]:
    return [
        model.generate(torch.tensor([ids]), **HOW, min_new_tokens=9, eos_token_id=-1)[0, len(ids) :].tolist()
        for ids in prompts()
    ]


@needs_pages
@pytest.mark.parametrize("pattern", [PATTERN, "stride(4) | window(2, 0)", "chunk(8)", "full()"])
@pytest.mark.parametrize("head", [LLAMA, "Qwen3ForCausalLM", "Gemma2ForCausalLM", "MistralForCausalLM"])
def test_requests_get_what_they_get_alone(head, pattern):
    if head != LLAMA and pattern != PATTERN:
        pytest.skip("patterns are those of one family")
    model = sparse_hf.sparsify(dense_model(head).eval(), pattern)
    before = model.config._attn_implementation
    found = in_batch(model)
    assert found == alone(model)
    assert model.config._attn_implementation == before


@needs_pages
def test_it_differs_from_dense():
    """Who reads the pages without a pattern would agree with the dense model."""
    dense = dense_model(LLAMA).eval()
    assert in_batch(sparse_hf.sparsify(dense, "window(2, 0)")) != alone(dense)


@needs_pages
def test_a_manager_is_kept_and_taken_again():
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    right = alone(model)
    assert in_batch(model, persistent_manager=True) == right
    assert in_batch(model, persistent_manager=True) == right
    model.destroy_cached_continuous_batching_manager()


@needs_pages
def test_keys_behind_a_window_of_the_family_are_kept():
    """The dense family slides over 8 tokens, and the pattern sees the first of all."""
    model = sparse_hf.sparsify(dense_model("MistralForCausalLM", sliding_window=8).eval(), PATTERN)
    assert in_batch(model) == alone(model)
    assert model.config.sliding_window == 8 and "get_text_config" not in vars(model.config)


@needs_pages
@pytest.mark.parametrize("name", ["GptOssForCausalLM", "DiffLlamaForCausalLM"])
def test_sinks_and_wide_values(name):
    """GPT-OSS has a learned logit in each head's denominator, DiffLlama values wider than its keys."""
    model = sparse_hf.sparsify(derived_model(name, **COMMON), PATTERN)
    assert in_batch(model) == alone(model)


@needs_pages
def test_what_the_caller_gave_is_read_and_stays(caplog):
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    how = GenerationConfig(**HOW)
    how.continuous_batching_config = ContinuousBatchingConfig(block_size=8, num_blocks=64)
    manager = model.init_continuous_batching(how)
    assert manager.continuous_batching_config.num_blocks == 64
    # the manager's word for none stays its own
    assert manager.generation_config.eos_token_id == -1 and how.eos_token_id is None
    assert "changes no pattern" not in caplog.text


@needs_pages
def test_layers_with_a_state_are_refused():
    model = sparse_hf.sparsify(derived_model("Lfm2ForCausalLM"), PATTERN)
    with pytest.raises(
        NotImplementedError, match="layers with a state of their own, which pages do not keep.*use generate"
    ):
        model.generate_batch(prompts(), generation_config=GenerationConfig(**HOW))


REFUSED = {
    "marks": (LLAMA, f"{PATTERN} | marked()", "marked tokens"),
    "two stacks": ("BartForConditionalGeneration", PATTERN, "two stacks"),
}


@needs_pages
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_computed_otherwise_is_refused(case):
    head, pattern, reason = REFUSED[case]
    layers = "decoder=window(7, 0)" if "Conditional" in head else None
    model = sparse_hf.sparsify(dense_model(head).eval(), pattern, layers=layers)
    with pytest.raises(NotImplementedError, match=f"{reason}.*use generate, which takes padded batches"):
        model.generate_batch(prompts(), generation_config=GenerationConfig(**HOW))


@needs_pages
def test_cuda_graphs_are_refused():
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    with pytest.raises(NotImplementedError, match="use_cuda_graph=True"):
        model.init_continuous_batching(GenerationConfig(**HOW), ContinuousBatchingConfig(use_cuda_graph=True))


@pytest.mark.skipif(IS_TAKEN, reason="this Transformers gives pages to others")
def test_older_versions_are_refused():
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    with pytest.raises(NotImplementedError, match="needs Transformers 5.24"):
        model.generate_batch(prompts(), generation_config=GenerationConfig(**HOW))
