"""BLOOM, MPT and Falcon: what their slopes by distance count, beyond the tables that every family goes through."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

import sparse_hf
from sparse_hf import Pattern
from tests.models.families import TINY, named_cache

PATTERN = "window(9, 9) | first(2)"
# heads that are no power of two have slopes of another kind
ALIBI = {
    "BloomForCausalLM": {**TINY["bloom"], "hidden_size": 48, "n_head": 6},
    "MptForCausalLM": {**TINY["mpt"], "d_model": 48, "n_heads": 6},
    "FalconForCausalLM": {**TINY["falcon"], "alibi": True, "multi_query": False},
}
FALCONS = {
    "rotary, keys of a group": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "rotary, keys of a head": {"multi_query": False, "new_decoder_architecture": False},
    "slopes, keys that all share": {"alibi": True},
}


def dense_model(head: str, **changes):
    torch.manual_seed(0)
    kind = getattr(transformers, head)
    dense = kind(kind.config_class(**{**ALIBI[head], **changes})).eval()
    for weight in dense.parameters():
        weight.data.mul_(3 if weight.ndim == 2 else 1)
    return dense


def some_ids(length: int = 60):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(1))


def of_dense(dense, ids, pattern: str):
    """The dense class under the pattern, in place of the mask that it makes."""
    place = torch.arange(ids.shape[1])
    held = Pattern.parse(f"({pattern}) & causal()").allows(place[:, None], place)
    mask = torch.where(held, 0.0, torch.finfo(torch.float32).min)[None, None].expand(len(ids), 1, -1, -1)
    module = {"bloom": modeling_bloom, "falcon": modeling_falcon}.get(dense.config.model_type)
    # their slopes are read off a mask of tokens
    inside = nullcontext() if module is None else patch.object(module, "create_causal_mask", lambda **_: mask)
    with inside:
        return dense(ids, labels=ids, **({"attention_mask": mask} if module is None else {}))


def assert_alike(one, other, dense, sparse):
    torch.testing.assert_close(other.logits, one.logits, atol=2e-5, rtol=2e-5)
    wanted, found = (torch.autograd.grad(o.loss, tuple(m.parameters())) for o, m in ((one, dense), (other, sparse)))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ALIBI)
def test_slopes_of_any_number_of_heads(head):
    dense, ids = dense_model(head), some_ids()
    sparse = sparse_hf.sparsify(dense, PATTERN)
    assert_alike(of_dense(dense, ids, PATTERN), sparse(ids, labels=ids), dense, sparse)


@pytest.mark.parametrize("changes", FALCONS.values(), ids=FALCONS)
def test_falcons_of_every_kind(changes):
    dense, ids = dense_model("FalconForCausalLM", **{"alibi": False, "multi_query": True, **changes}), some_ids()
    sparse = sparse_hf.sparsify(dense, PATTERN)
    assert_alike(of_dense(dense, ids, PATTERN), sparse(ids, labels=ids), dense, sparse)
    more = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached, again = (sparse.generate(ids, use_cache=c, **more) for c in (True, False))
    assert torch.equal(cached, again)


@pytest.mark.parametrize("head", ALIBI)
@pytest.mark.parametrize("pattern", [PATTERN, "window(None, None)"])
def test_padding_in_front_shifts_nothing(head, pattern):
    sparse, ids = sparse_hf.sparsify(dense_model(head), pattern), some_ids()
    real = torch.ones_like(ids)
    real[0, :11] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            sparse(ids, attention_mask=real).logits[:1, 11:], sparse(ids[:1, 11:]).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("head", ["BloomForCausalLM", "FalconForCausalLM"])
@pytest.mark.parametrize("pattern", [PATTERN, "window(None, None)"])
def test_padding_inside_a_row_has_no_distance(head, pattern):
    dense, ids = dense_model(head), some_ids()
    sparse, real = sparse_hf.sparsify(dense, pattern), torch.ones_like(ids)
    real[0, 20:31] = 0
    kept = torch.cat((torch.arange(20), torch.arange(31, 60)))
    with torch.no_grad():
        found = sparse(ids, attention_mask=real).logits[:1, kept]
        if head == "FalconForCausalLM" or pattern == PATTERN:
            wanted = sparse(ids[:1, kept]).logits
        else:
            wanted = dense(ids, attention_mask=real).logits[:1, kept]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_mpt_reads_on_behind_its_longest_text():
    dense = dense_model("MptForCausalLM", max_seq_len=512)
    short = dense_model("MptForCausalLM", max_seq_len=32)
    ids = some_ids()
    with torch.no_grad():
        wanted = of_dense(dense, ids, PATTERN).logits
        found = sparse_hf.sparsify(short, PATTERN)(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


STREAMED = (
    "window(9, 0) | first(2)", "window(9, 0)", "chunk(8) | first(3)", "first(1) | fixed(8, 2)",
    "window(9, 0) | marked_keys() | first(2)",
)  # fmt: skip


@pytest.mark.cross
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", STREAMED)
@pytest.mark.parametrize("head", ALIBI)
def test_distances_in_a_stream_are_the_true_ones(head, pattern, padded):
    model, ids = sparse_hf.sparsify(dense_model(head), pattern), some_ids(90)
    real = (torch.arange(90) >= torch.tensor([[33 * padded], [0]])).long()
    marks = (torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) < 0.1) & real.bool()
    marked = {"global_attention_mask": marks} if model.config.uses_marks else {}
    cache, found, begin = sparse_hf.StreamingCache(model.config, spare=2), [], 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=real, use_cache=False, **marked).logits
        for size in (35, 1, 13, *[1] * 20, 21):
            end = begin + size
            part = {name: t[:, begin:end] for name, t in marked.items()}
            given = {"attention_mask": real[:, :end], **named_cache(model, cache), **part}
            found.append(model(ids[:, begin:end], **given).logits)
            begin = end
    assert begin == 90
    torch.testing.assert_close(torch.cat(found, 1)[real.bool()], wanted[real.bool()], atol=1e-4, rtol=1e-4)


def test_a_stream_of_slopes_is_generated():
    model, ids = sparse_hf.sparsify(dense_model("BloomForCausalLM"), PATTERN), some_ids(30)
    how = {"do_sample": False, "max_new_tokens": 15, "min_new_tokens": 15, "pad_token_id": 0}
    wanted = model.generate(ids, use_cache=False, **how)
    assert torch.equal(model.generate(ids, cache_implementation="streaming", **how), wanted)


@pytest.mark.parametrize("made", [transformers.DynamicCache, sparse_hf.StreamingCache])
def test_a_cache_that_would_not_be_used_is_refused(made):
    """MPT's configuration says so of all calls; the cache would take the whole text at every step."""
    model, ids = sparse_hf.sparsify(dense_model("MptForCausalLM"), PATTERN), some_ids(30)
    how = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    wanted, given = model.generate(ids, **how), named_cache(model, made(config=model.config))
    with pytest.raises(
        ValueError, match=f"given a {made.__name__}, and use_cache=False.*give use_cache=True, or no cache"
    ):
        model.generate(ids, **how, **given)
    assert torch.equal(model.generate(ids, **how, **given, use_cache=True), wanted)


def test_positions_are_those_that_a_falcon_has():
    slopes = sparse_hf.sparsify(dense_model("FalconForCausalLM"), "window(9, 0) | first(2)").config
    angles = sparse_hf.sparsify(dense_model("FalconForCausalLM", alibi=False), "window(9, 0) | first(2)").config
    assert (slopes.positions.scheme, angles.positions.scheme) == ("alibi", "rotary")
    assert slopes.positions.reach_of(slopes) is None
    assert sparse_hf.StreamingCache(slopes, positions="auto").turns_from is None
    with pytest.raises(ValueError, match="sparse_falcon has positions that are alibi"):
        sparse_hf.StreamingCache(slopes, positions="cache")


@pytest.mark.parametrize("head", ALIBI)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", ["static", "dynamic", "streaming"])
def test_slopes_with_every_cache(head, padding, kind):
    model = sparse_hf.sparsify(dense_model(head), "window(9, 0) | first(2)")
    ids = torch.randint(3, 90, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ask = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    found = model.generate(ids, use_cache=True, cache_implementation=kind, **ask)
    assert torch.equal(found, model.generate(ids, use_cache=False, **ask))
