"""Marks and documents reach the layers of dense classes that keep from them the arguments that they do not know."""

from __future__ import annotations

import pytest
import torch
import transformers

import sparse_hf
from tests.models.families import COMMON, TINY, named_cache

SIZES = {
    "StableLmForCausalLM": {**COMMON, "num_key_value_heads": 4},
    "BloomForCausalLM": TINY["bloom"],
    "MPNetForMaskedLM": TINY["mpnet"],
    "FalconForCausalLM": TINY["falcon"],
    # it makes a mask only where one is given
    "Aimv2TextModel": COMMON,
}


def models(head: str):
    """One whose first token is global, and one that is told so by a mark."""
    torch.manual_seed(0)
    kind = getattr(transformers, head)
    if not issubclass(
        kind.config_class, getattr(transformers, f"{head.partition('For')[0].removesuffix('Model')}Config")
    ):
        pytest.skip("the class names a configuration of another one in this version of Transformers")
    dense = kind(kind.config_class(**SIZES[head])).eval()
    for weight in dense.parameters():
        weight.data.mul_(3 if weight.ndim == 2 else 1)
    return [sparse_hf.sparsify(dense, f"window(1, 1) | {word}") for word in ("first(1)", "marked()")]


def checkpoint(model) -> None:
    enable = getattr(model.train(), "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def text():
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    return ids, marks


@pytest.mark.parametrize("head", SIZES)
def test_marks_reach_the_layers(head):
    (by_word, by_mark), (ids, marks) = models(head), text()
    with torch.no_grad():
        wanted, found = by_word(ids)[0], by_mark(ids, global_attention_mask=marks)[0]
        torch.testing.assert_close(found, wanted)
        assert (by_mark(ids)[0] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("head", ["StableLmForCausalLM", "BloomForCausalLM", "FalconForCausalLM"])
def test_marks_reach_layers_that_are_computed_again(head):
    (by_word, by_mark), (ids, marks) = models(head), text()
    wanted = torch.autograd.grad(by_word(ids)[0].sin().sum(), by_word.get_input_embeddings().weight)
    checkpoint(by_mark)
    found = torch.autograd.grad(
        by_mark(ids, global_attention_mask=marks)[0].sin().sum(), by_mark.get_input_embeddings().weight
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_marks_that_would_be_lost_when_layers_are_computed_again_are_refused():
    (_, by_mark), (ids, marks) = models("Aimv2TextModel"), text()
    checkpoint(by_mark)
    with pytest.raises(NotImplementedError, match="which gradient checkpointing computes again; pass attention_mask"):
        by_mark(ids, global_attention_mask=marks)


def test_marks_in_a_graph_are_refused():
    _, by_mark = models("BloomForCausalLM")
    ids, marks = text()
    compiled = torch.compile(by_mark, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="keeps global_attention_mask from its layers in a compiled graph"):
        compiled(ids, global_attention_mask=marks)


def test_packed_documents_are_kept_apart():
    by_word, _ = models("MPNetForMaskedLM")
    ids, _ = text()
    # its positions begin behind the padding id
    positions = torch.cat((torch.arange(15), torch.arange(25))).expand(2, -1) + 2
    with torch.no_grad():
        alone = [by_word(part)[0] for part in (ids[:, :15], ids[:, 15:])]
        packed = by_word(ids, position_ids=positions)[0]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("head", ["FalconForCausalLM", "StableLmForCausalLM"])
def test_a_streaming_cache_reaches_the_layers(head):
    torch.manual_seed(0)
    kind = getattr(transformers, head)
    sparse = sparse_hf.sparsify(kind(kind.config_class(**SIZES[head])).eval(), "window(7, 0) | first(2)")
    ids, more = text()[0], {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = sparse.generate(ids, use_cache=False, **more)
    assert torch.equal(
        sparse.generate(ids, **named_cache(sparse, sparse_hf.StreamingCache(sparse.config)), **more), wanted
    )
