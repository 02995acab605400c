"""Documents are read off positions that begin anew, and where a mask of pairs is given it alone says who sees whom.

The kind: positions that repeat or fall back for other reasons (a tree of tokens, groups, jumps) are no packed documents.
Compared with Transformers' dense classes on the same inputs. Looked at: families with tables of positions, rotary ones,
such with windows of their own, and one trained by masking; with and without a cache; eager and compiled; encoder-decoders.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2Model, DynamicCache, Lfm2Config, Lfm2Model

import sparse_hf
from sparse_hf.models.hf.documents import number_documents
from tests.models.families import VOCABULARY, additive, dense_model, explicit_mask, named_cache

LIMIT = {"rtol": 1e-4, "atol": 1e-5}
ALL = "window(None, None)"
DECODERS = ["LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"]
HEADS = [*DECODERS, "BertForMaskedLM"]
# two branches behind six common tokens
TREE = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 6, 7]])


def text(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def tree_mask(is_causal: bool) -> Tensor:
    mask = torch.ones(10, 10, dtype=torch.bool)
    mask[8:, 6:8] = mask[6:8, 8:] = False
    return (mask.tril() if is_causal else mask)[None, None]


def logits(model, ids: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("head", HEADS)
def test_a_mask_of_pairs_is_not_cut_by_repeated_positions(head, kind):
    dense, ids, mask = dense_model(head), text(2, 10), tree_mask(head in DECODERS)
    mask = mask if kind == "bool" else additive(mask)
    given = {"attention_mask": mask.expand(2, -1, -1, -1), "position_ids": TREE.expand(2, -1)}
    sparse = sparse_hf.sparsify(dense, ALL)
    torch.testing.assert_close(logits(sparse, ids, **given), logits(dense, ids, **given), **LIMIT)


@pytest.mark.parametrize("head", DECODERS)
def test_a_tree_behind_a_cache(head):
    dense, ids = dense_model(head), text(1, 30)
    sparse = sparse_hf.sparsify(dense, "window(12, 0) | first(2)")
    of_pattern = explicit_mask(sparse.config.layer_pattern(0), 30, torch.ones_like(ids), None, True)
    seen = torch.ones(30, 30, dtype=torch.bool).tril()
    seen[28:, 26:28] = False
    positions = torch.cat([torch.arange(28), torch.arange(26, 28)])[None]
    wanted = logits(dense, ids, attention_mask=of_pattern & seen, position_ids=positions)
    cache = DynamicCache()
    first = logits(sparse, ids[:, :20], position_ids=positions[:, :20], **named_cache(sparse, cache))
    rest = {"attention_mask": seen[None, None, 20:], "position_ids": positions[:, 20:], **named_cache(sparse, cache)}
    second = logits(sparse, ids[:, 20:], **rest)
    torch.testing.assert_close(torch.cat([first, second], 1), wanted, **LIMIT)


ON_PURPOSE = {
    "groups": torch.arange(20) // 2,
    "groups of three": torch.arange(20) // 3,
    "the same for all": torch.zeros(20, dtype=torch.long),
    "jumps": torch.cat([torch.arange(8), torch.arange(40, 52)]),
    "a tree": torch.cat([torch.arange(12), torch.arange(6, 14)]),
    "twice each in the end": torch.cat([torch.arange(12), torch.arange(12, 16).repeat_interleave(2)]),
}


@pytest.mark.cross("head", ("positions", "cached"), "masked")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", ON_PURPOSE.values(), ids=ON_PURPOSE)
@pytest.mark.parametrize("head", HEADS)
def test_positions_that_repeat_or_jump_on_purpose(head, positions, masked, cached):
    if cached and head not in DECODERS:
        pytest.skip("has no cache")
    dense, ids = dense_model(head), text(2, 20)
    given: dict = {"position_ids": positions.expand(2, -1)}
    given |= {"attention_mask": torch.ones_like(ids)} if masked else {}
    given |= {"use_cache": cached} if head in DECODERS else {}
    # where there is neither a mask nor a cache, the dense class itself takes each jump for a document
    found = logits(sparse_hf.sparsify(dense, ALL), ids, **given)
    torch.testing.assert_close(found, logits(dense, ids, **given), **LIMIT)


@pytest.mark.compiles
def test_a_graph_reads_the_same_documents():
    torch._dynamo.reset()
    ids = text(2, 20)
    dense = dense_model("LlamaForCausalLM", num_hidden_layers=1)
    sparse = sparse_hf.sparsify(dense, "window(7, 0) | first(2)")
    compiled = torch.compile(sparse, backend="eager", fullgraph=True)
    packed = torch.cat([torch.arange(1), torch.arange(12), torch.arange(7)])
    for positions in (*ON_PURPOSE.values(), packed):
        for cached in (False, True):
            given = {"position_ids": positions.expand(2, -1), "use_cache": cached}
            torch.testing.assert_close(logits(compiled, ids, **given), logits(sparse, ids, **given), **LIMIT)


@pytest.mark.compiles
def test_a_graph_takes_no_mask_of_pairs():
    torch._dynamo.reset()
    ids, mask = text(1, 10), tree_mask(True)
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM", num_hidden_layers=1), "window(4, 0)")
    with pytest.raises(Exception, match="4-D attention mask, cannot be compiled; pass a 2-D attention mask"):
        torch.compile(sparse, backend="eager", fullgraph=True)(ids, attention_mask=mask)
    torch._dynamo.reset()
    broken = torch.compile(sparse, backend="eager")
    given = {"attention_mask": mask}
    torch.testing.assert_close(logits(broken, ids, **given), logits(sparse, ids, **given), **LIMIT)


@pytest.mark.cross
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("lengths", [(7, 20, 13), (1, 20, 1, 1, 17), (20, 1)])
@pytest.mark.parametrize("head", ["LlamaForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM"])
def test_documents_of_any_length_are_apart(head, lengths, cached, masked):
    sparse = sparse_hf.sparsify(dense_model(head), "window(12, 0) | first(2)")
    texts = [text(1, n + 3)[:, 3:] for n in lengths]
    packed, positions = torch.cat(texts, 1), torch.cat([torch.arange(n) for n in lengths])[None]
    mask = {"attention_mask": torch.ones_like(packed)} if masked else {}
    found = logits(sparse, packed, position_ids=positions, use_cache=cached, **mask)
    torch.testing.assert_close(found, torch.cat([logits(sparse, t) for t in texts], 1), **LIMIT)


@pytest.mark.parametrize(
    ("positions", "documents"),
    [
        ([0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 1, 2]),
        # a row that begins in the middle of a document
        ([57, 58, 0, 1, 2, 0], [0, 0, 1, 1, 1, 2]),
        # RoBERTa counts from 2
        ([2, 3, 4, 2, 3, 2], [0, 0, 0, 1, 1, 2]),
        ([0, 0, 0, 1, 2, 0], [0, 1, 2, 2, 2, 3]),
        ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]),
        ([0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([0, 1, 2, 3, 2, 3], [0, 0, 0, 0, 0, 0]),
        ([0, 1, 9, 10], [0, 0, 0, 0]),
    ],
)
def test_numbers_of_documents(positions, documents):
    positions, documents = torch.tensor([positions]), torch.tensor([documents])
    assert torch.equal(number_documents(positions, None), documents)
    # the same with padding on both sides, whose positions are anything
    padded = torch.nn.functional.pad(positions, (2, 3), value=1)
    real = torch.nn.functional.pad(torch.ones_like(positions), (2, 3)).bool()
    assert torch.equal(number_documents(padded, real)[real], documents[0])


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "MistralForCausalLM", "ModernBertForMaskedLM"])
def test_bounds_of_flash_attention_alone(head):
    sparse = sparse_hf.sparsify(dense_model(head), "window(12, 12) | first(2)")
    lengths = (7, 1, 20, 13)
    texts = [text(1, n + 3)[:, 3:] for n in lengths]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 20, "max_length_k": 20}
    wanted = torch.cat([logits(sparse, t) for t in texts], 1)
    torch.testing.assert_close(logits(sparse, torch.cat(texts, 1), **given), wanted, **LIMIT)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = logits(sparse, torch.cat(texts, 1), position_ids=positions, **given)
    torch.testing.assert_close(found, wanted, **LIMIT)
    with pytest.raises(ValueError, match="cu_seq_lens are those of one row, and this batch has 2; pass position_ids"):
        sparse(torch.cat(texts, 1).expand(2, -1), **given)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("GPT2LMHeadModel", "without position_ids, so that the positions of sparse_gpt2 would run on"),
        ("BertForMaskedLM", "without position_ids, so that the positions of sparse_bert would run on"),
        ("T5ForConditionalGeneration", "cu_seq_lens were given, and sparse_t5 has two texts"),
    ],
)
def test_bounds_that_positions_do_not_follow_are_refused(head, message):
    layers = {"layers": "decoder=window(12, 0)"} if "T5" in head else {}
    sparse = sparse_hf.sparsify(dense_model(head), "window(12, 0)", **layers)
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        sparse(text(1, 20), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)


def test_a_mask_of_pairs_of_numbers_is_refused():
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(12, 0)")
    with pytest.raises(ValueError, match="dtype torch.int64, of which 0 might say either"):
        sparse(text(1, 10), attention_mask=tree_mask(True).long())


def test_documents_that_a_convolution_mixes_are_said(monkeypatch):
    """DeBERTa v2 may have one, and LFM2 has layers of them; both mix documents of a row in Transformers too."""
    said = []
    monkeypatch.setattr("sparse_hf.models.hf.documents.logger.warning_once", said.append)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32,
    }  # fmt: skip
    packed = {"input_ids": text(1, 12) % 90 + 3, "position_ids": torch.arange(6).repeat(2)[None]}
    for more in ({}, {"conv_kernel_size": 3}):
        assert not said
        config = DebertaV2Config(**sizes, relative_attention=True, position_buckets=8, **more)
        sparse_hf.sparsify(DebertaV2Model(config).eval(), "window(3, 3)")(**packed)
    assert "sparse_deberta_v2 mixes them by a convolution" in said[-1]
    config = Lfm2Config(**sizes, num_key_value_heads=1, layer_types=["conv", "full_attention"])
    sparse_hf.sparsify(Lfm2Model(config).eval(), "window(3, 0)")(**packed, use_cache=False)
    assert "sparse_lfm2 mixes them by layers of another kind than attention" in said[-1]
