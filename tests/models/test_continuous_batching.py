"""`generate_batch` of Transformers: requests side by side in one row, each of which gets the tokens that it gets alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import sparse_hf
from sparse_hf.models.hf.kept import Kept
from sparse_hf.models.hf.pages import ALL_KEPT, RING, RingOfPages
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
@pytest.mark.parametrize(
    "pattern",
    [
        PATTERN, "window(7, 0)", "stride(4) | window(2, 0)", "chunk(8)", "chunk(4, 1) | first(2)", "stride(2) & window(9, 0)", "full()",
        "per_head(window(3, 0), window(9, 0), first(4), first(3) | window(1, 0))", "summary(8, 1) | window(7, 0)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", [LLAMA, "Qwen3ForCausalLM", "Gemma2ForCausalLM", "MistralForCausalLM"])
def test_requests_get_what_they_get_alone(head, pattern):
    if head != LLAMA and pattern != PATTERN:
        pytest.skip("patterns are those of one family")
    model = sparse_hf.sparsify(dense_model(head).eval(), pattern)
    before = model.config._attn_implementation
    found = in_batch(model)
    assert found == alone(model)
    assert model.config._attn_implementation == before


class Pages:
    """How many pages requests had at most, by the kind of layers; and keys that were read of them, in all."""

    def __init__(self, monkeypatch):
        self.most, self.read, made = {}, {}, ContinuousBatchingManager._create_batch_processor

        def create(manager):
            processor = made(manager)
            for kind, allocator in processor.cache.cache_allocators.items():
                self.watch(kind, allocator)
            return processor

        monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", create)

    def watch(self, kind, allocator):
        allocate = allocator.allocate_cache_to_request

        def watched(name, past, new):
            allocate(name, past, new)
            self.most[kind] = max(self.most.get(kind, 0), len(allocator.block_table[name]))
            self.read[kind] = self.read.get(kind, 0) + allocator.get_seqlen_k(past, new)

        allocator.allocate_cache_to_request = watched


@needs_pages
@pytest.mark.parametrize(
    ("pattern", "layers", "most"),
    [
        ("window(20, 0) | first(3)", None, {RING: 3}),
        ("chunk(8)", None, {RING: 2}),
        ("window(20, 0)", {0: "dense"}, {RING: 3, ALL_KEPT: 9}),
        # what the wider layer needs
        ("window(20, 0)", {0: "window(30, 0) | first(2)"}, {RING: 5}),
        ("stride(4) | window(2, 0)", None, {ALL_KEPT: 9}),
    ],
)
def test_pages_behind_a_window_are_given_back(pattern, layers, most, monkeypatch):
    """A request of 69 tokens, of which all would be 9 pages of 8; prompts come in pieces of 32 tokens at most."""
    model, seen = sparse_hf.sparsify(dense_model(LLAMA).eval(), pattern, layers=layers), Pages(monkeypatch)
    ids = torch.randint(5, VOCABULARY, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    given = ContinuousBatchingConfig(block_size=8, num_blocks=64, max_batch_tokens=32)
    how = GenerationConfig(**HOW, eos_token_id=-1)
    (result,) = model.generate_batch([ids], generation_config=how, continuous_batching_config=given).values()
    right = model.generate(torch.tensor([ids]), **HOW, min_new_tokens=9, eos_token_id=-1)[0, 60:].tolist()
    assert result.generated_tokens == right
    assert seen.most == most


@needs_pages
def test_a_ring_of_pages_has_each_token_where_the_next_ones_look():
    """Against a list of all tokens, for pieces of any size."""

    class Allocator:
        block_table, tokens_per_page, block_physical_stride = {"a": [5, 0, 7, 2]}, 4, 40
        sentinel_index, write_trash_index = -1, -2

    generator = torch.Generator().manual_seed(0)
    for kept in (Kept(3, 8), Kept(0, 5), Kept(2, 6, 4), Kept(6, 1), Kept(0, 15)):
        ring, memory, past = RingOfPages(kept, Allocator), {}, 0
        while past < 100:
            new = int(torch.randint(1, 25, (), generator=generator))
            read = ring.get_read_indices("a", past, new)
            dropped = max(0, past - kept.sinks - kept.left) // kept.period * kept.period
            sinks = min(past, kept.sinks)
            assert [memory[place] for place in read[:-new]] == [*range(sinks), *range(sinks + dropped, past)]
            assert read[-new:] == [-1] * new and len(read) == ring.get_seqlen_k(past, new)
            written = ring.get_write_indices("a", past, new)
            real = [place for place in written if place >= 0]
            assert len(written) == new and len(set(real)) == len(real)
            memory |= dict(zip(written, range(past, past + new), strict=True))
            past += new
        assert len({place for place in memory if place >= 0}) == RingOfPages.slots(kept) <= 16


def test_pages_of_another_kind_are_refused():
    with pytest.raises(NotImplementedError, match="have no get_read_indices, .*sentinel_index.*; use generate"):
        RingOfPages(Kept(3, 8), type("Pages", (), {"get_seqlen_k": 0, "get_write_indices": 0})()).stand_in()


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
def test_a_configuration_that_decodes_dense_is_refused():
    """`generate` would have tokens behind a prompt see all of it."""
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), "window(2, 0)", decode="dense")
    with pytest.raises(NotImplementedError, match=r"decode='dense' in its configuration.*use generate, which takes"):
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
