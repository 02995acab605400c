"""Padding inside a row shifts nothing: positions count real tokens, as they do for padding before and behind a text.

The kind: a prefix in a cache and questions of several lengths behind it, or holes in a mask. Compared with the row alone,
without its padding, and with Transformers' dense classes under the pattern's mask. Looked at: dynamic, static and
streaming caches; families of every scheme of positions, T5's bias among them; backends; gradients; packed documents.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import sparse_hf
from sparse_hf import StreamingCache
from tests.models.families import VOCABULARY, dense_model, explicit_mask, named_cache

LIMIT = {"rtol": 1e-4, "atol": 1e-5}
LLAMA = "LlamaForCausalLM"
DECODERS = [
    LLAMA,
    "MistralForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Phi3ForCausalLM",
]
PATTERNS = [
    "window(9, 0) | first(3)",
    "chunk(8)",
    "stride(5) | window(3, 0)",
    "window(20, 20) & stride(3)",
    "per_head(first(2), chunk(9), window(5, 5), stride(4))",
    "window(4, 0) | marked()",
]


def text(rows: int, length: int, seed: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def holes(rows: int = 2, length: int = 60) -> Tensor:
    """Real tokens, the first row without all of them; the last token is real."""
    real = torch.ones(rows, length, dtype=torch.long)
    real[0, :4] = real[0, 20:27] = real[0, 40:41] = 0
    return real


def positions_of(real: Tensor) -> Tensor:
    return (real.cumsum(1) - 1).clamp(min=0)


def marks_for(pattern: str, ids: Tensor) -> dict:
    if "marked" not in pattern:
        return {}
    marks = torch.zeros_like(ids)
    marks[:, [10, 33]] = 1
    return {"global_attention_mask": marks}


@pytest.mark.cross
@pytest.mark.parametrize("implementation", ["sparse", "sparse_blockwise", "sparse_reference"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("head", [LLAMA, "BertForMaskedLM", "GPT2LMHeadModel"])
def test_a_row_with_holes_is_the_row_without_them(head, pattern, implementation):
    sparse = sparse_hf.sparsify(dense_model(head), pattern)
    sparse.set_attn_implementation(implementation)
    ids, real = text(2, 60), holes()
    marks = marks_for(pattern, ids)
    with torch.no_grad():
        both = sparse(ids * real, attention_mask=real, position_ids=positions_of(real), **marks).logits
        keep = real[0].bool()
        cut = {name: mask[:1, keep] for name, mask in marks.items()}
        alone = [sparse(ids[:1, keep], **cut).logits, sparse(ids[1:], **{n: m[1:] for n, m in marks.items()}).logits]
    torch.testing.assert_close(both[:1, keep], alone[0], **LIMIT)
    torch.testing.assert_close(both[1:], alone[1], **LIMIT)


def test_gradients_are_those_of_the_row_without_holes():
    sparse = sparse_hf.sparsify(dense_model(LLAMA), PATTERNS[0]).train()
    ids, real = text(1, 60), holes(1)
    keep, weights = real[0].bool(), [p for p in sparse.parameters() if p.requires_grad]
    given = {"attention_mask": real, "position_ids": positions_of(real), "use_cache": False}
    with_holes = torch.autograd.grad(sparse(ids * real, **given).logits[:, keep].square().sum(), weights)
    without = torch.autograd.grad(sparse(ids[:, keep], use_cache=False).logits.square().sum(), weights)
    for one, other in zip(with_holes, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_weights_are_those_of_the_row_without_holes():
    sparse = sparse_hf.sparsify(dense_model(LLAMA), PATTERNS[0])
    sparse.set_attn_implementation("sparse_reference")
    ids, real = text(1, 60), holes(1)
    keep = real[0].bool()
    given = {"attention_mask": real, "position_ids": positions_of(real), "output_attentions": True}
    with torch.no_grad():
        found = sparse(ids * real, **given).attentions[0]
        alone = sparse(ids[:, keep], output_attentions=True).attentions[0]
    torch.testing.assert_close(found[:, :, keep][..., keep], alone, **LIMIT)
    assert not found[..., ~keep].any()


@pytest.mark.cross
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("head", DECODERS)
def test_questions_behind_a_prefix_in_a_cache(head, kind):
    sparse = sparse_hf.sparsify(dense_model(head), "window(20, 0) | first(3)")
    prefix, questions = text(1, 50, 5), text(2, 12, 1)
    real = torch.ones_like(questions)
    real[1, :5] = 0
    greedy = {
        "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=sparse.config, max_cache_len=80)
    with torch.no_grad():
        sparse(prefix.expand(2, -1), **named_cache(sparse, cache))
    ids = torch.cat([prefix.expand(2, -1), questions * real], 1)
    mask = torch.cat([torch.ones(2, 50, dtype=torch.long), real], 1)
    both = sparse.generate(ids, attention_mask=mask, **named_cache(sparse, cache), **greedy).logits
    for row, begin in ((0, 0), (1, 5)):
        whole = torch.cat([prefix, questions[row : row + 1, begin:]], 1)
        alone = sparse.generate(whole, use_cache=False, **greedy).logits
        torch.testing.assert_close(torch.stack(both)[:, row], torch.stack(alone)[:, 0], **LIMIT)


@pytest.mark.parametrize("pattern", ["window(None, None)", "window(9, 9) | first(3)", "chunk(8)"])
def test_a_bias_goes_by_distances_in_the_row(pattern):
    """T5's distances count padding in Transformers too; pairs are those of real tokens."""
    dense = dense_model("T5EncoderModel")
    sparse = sparse_hf.sparsify(dense, pattern, layers="decoder=window(8, 0)")
    ids, real = text(2, 60), holes()
    mask = torch.zeros(2, 1, 60, 60, dtype=torch.bool)
    for row in range(2):
        keep = real[row].nonzero()[:, 0]
        pairs = explicit_mask(pattern, len(keep), torch.ones(1, len(keep)), None, False)[0, 0]
        mask[row, 0, keep[:, None], keep] = pairs
    # rows of padding attend to something in the dense class, and nobody reads them
    mask |= torch.eye(60, dtype=torch.bool)
    with torch.no_grad():
        found = sparse(ids * real, attention_mask=real).last_hidden_state
        wanted = dense(
            ids * real, attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float).min)
        ).last_hidden_state
    torch.testing.assert_close(found[real.bool()], wanted[real.bool()], **LIMIT)


def test_padding_between_packed_documents_shifts_nothing():
    sparse = sparse_hf.sparsify(dense_model(LLAMA), PATTERNS[0])
    first, second = text(1, 20, 1), text(1, 30, 2)
    gap = torch.zeros(1, 6, dtype=torch.long)
    ids, real = torch.cat([first, gap, second, gap], 1), torch.ones(1, 62, dtype=torch.long)
    real[:, 20:26] = real[:, 56:] = 0
    positions = torch.cat([torch.arange(20), gap[0], torch.arange(30), gap[0]])[None]
    with torch.no_grad():
        found = sparse(ids, attention_mask=real, position_ids=positions).logits
        torch.testing.assert_close(found[:, :20], sparse(first).logits, **LIMIT)
        torch.testing.assert_close(found[:, 26:56], sparse(second).logits, **LIMIT)


def test_a_streaming_cache_refuses_it():
    sparse = sparse_hf.sparsify(dense_model(LLAMA), PATTERNS[0])
    with pytest.raises(ValueError, match="padding behind real tokens, whose keys a StreamingCache cannot tell"):
        sparse(text(2, 60), attention_mask=holes(), **named_cache(sparse, StreamingCache(sparse.config)))


@pytest.mark.compiles
def test_compiled_code_refuses_it():
    torch._dynamo.reset()
    sparse = sparse_hf.sparsify(dense_model(LLAMA), PATTERNS[0])
    ids, compiled = text(2, 60), torch.compile(sparse, backend="eager", fullgraph=True)
    with torch.no_grad():
        for padded in (slice(0, 9), slice(50, None)):
            real = torch.ones_like(ids)
            real[0, padded] = 0
            found, wanted = (model(ids, attention_mask=real).logits for model in (compiled, sparse))
            torch.testing.assert_close(found, wanted, **LIMIT)
        with pytest.raises(ValueError, match="padding inside a row, between real tokens, which compiled code cannot"):
            compiled(ids, attention_mask=holes())


@pytest.mark.compiles
def test_compiled_code_looks_at_a_mask_once_for_all_layers():
    torch._dynamo.reset()
    sparse, found = sparse_hf.sparsify(dense_model(LLAMA), PATTERNS[0]), []

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    ids, real = text(2, 60), torch.ones(2, 60, dtype=torch.long)
    real[0, :9] = 0
    with torch.no_grad():
        torch.compile(sparse, backend=backend, fullgraph=True)(ids, attention_mask=real)
    assert found.count("sparse_hf.without_inner_padding.default") == 1
    assert found.count("sparse_hf.attention.default") > 1
