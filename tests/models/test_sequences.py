"""Packed equals separate, padded equals unpadded, cached equals uncached, and no token hears of its future."""

from __future__ import annotations

import pytest
import torch

import sparse_hf
from sparse_hf import sparse_attention
from tests.models.families import VOCABULARY, dense_model

COUNTED = [
    "window(20, 5) | first(4)",
    "chunk(16)",
    "window(40, 40) & stride(3)",
    "stride(7)",
    "fixed(16, 3)",
    "random_blocks(2, 16, 1)",
    "streaming(window=16, sinks=2)",
    "per_head(first(2), chunk(9), window(5, 5), stride(4))",
    "window(9, 9) | marked()",
]
LENGTHS = (50, 63, 17)
LIMIT = {"rtol": 1e-4, "atol": 1e-5}


def documents(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (1, n), generator=generator) for n in LENGTHS]


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("pattern", COUNTED)
def test_attention_packed_equals_separate(pattern, backend):
    total = sum(LENGTHS)
    q, k, v = (torch.randn(1, 4, total, 16, dtype=torch.float64) for _ in range(3))
    marks = torch.rand(1, total) < 0.05
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    packed = sparse_attention(q, k, v, pattern, segment_ids=segments, marks=marks, backend=backend)
    pieces = zip(*(t.split(LENGTHS, 2) for t in (q, k, v)), marks.split(LENGTHS, 1), strict=True)
    separate = [sparse_attention(a, b, c, pattern, marks=m, backend=backend) for a, b, c, m in pieces]
    torch.testing.assert_close(packed, torch.cat(separate, 2))


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("pattern", COUNTED)
def test_attention_left_padded_equals_unpadded(pattern, backend):
    q, k, v = (torch.randn(1, 4, 140, 16, dtype=torch.float64) for _ in range(3))
    marks = torch.rand(1, 140) < 0.05
    real = torch.arange(140)[None] >= 39
    padded = sparse_attention(q, k, v, pattern, key_padding_mask=real, marks=marks, backend=backend)
    cut = (t[:, :, 39:] for t in (q, k, v))
    torch.testing.assert_close(padded[:, :, 39:], sparse_attention(*cut, pattern, marks=marks[:, 39:], backend=backend))


@pytest.mark.parametrize("pattern", COUNTED)
@pytest.mark.parametrize("head", ["BertModel", "LlamaModel"])
def test_models_packed_equals_separate(head, pattern):
    sparse = sparse_hf.sparsify(dense_model(head), pattern)
    texts = documents()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    marks = torch.zeros(1, sum(LENGTHS), dtype=torch.long)
    marks[0, [3, 60, 100]] = 1
    extra = [{"global_attention_mask": m} if "marked" in pattern else {} for m in (marks, *marks.split(LENGTHS, 1))]
    packed = sparse(torch.cat(texts, 1), position_ids=positions, **extra[0]).last_hidden_state
    separate = [sparse(t, **e).last_hidden_state for t, e in zip(texts, extra[1:], strict=True)]
    torch.testing.assert_close(packed, torch.cat(separate, 1), **LIMIT)


@pytest.mark.parametrize("pattern", COUNTED)
@pytest.mark.parametrize("head", ["BertModel", "LlamaModel"])
def test_models_left_padded_equals_unpadded(head, pattern):
    sparse = sparse_hf.sparsify(dense_model(head), pattern)
    text = documents()[1]
    padded = torch.cat([torch.zeros(1, 29, dtype=torch.long), text], 1)
    real = (torch.arange(padded.shape[1]) >= 29).long()[None]
    marks = torch.zeros_like(padded)
    marks[0, 40] = 1
    extra = [{"global_attention_mask": m} if "marked" in pattern else {} for m in (marks, marks[:, 29:])]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    got = sparse(padded, attention_mask=real, position_ids=positions, **extra[0]).last_hidden_state
    torch.testing.assert_close(got[:, 29:], sparse(text, **extra[1]).last_hidden_state, **LIMIT)


@pytest.mark.parametrize("pattern", COUNTED)
def test_a_decoder_hears_nothing_of_its_future(pattern):
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), pattern)
    text = torch.cat(documents(), 1)
    extra = (
        {"global_attention_mask": (torch.arange(text.shape[1]) % 31 == 3).long()[None]} if "marked" in pattern else {}
    )
    before = sparse(text, **extra).logits
    for t in (1, 64, 100, 129):
        changed = text.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCABULARY
        after = sparse(changed, **extra).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pattern", ["window(16, 0) | first(2)", "stride(5) | window(3, 0)", "window(8, 0) | marked()"])
def test_generation_with_a_cache_equals_without(pattern, beams):
    ids = [5, 6, 7, 8] if "marked" in pattern else []
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), pattern, global_token_ids=ids)
    padded = torch.cat([documents()[0], documents(1)[0]])
    real = torch.ones_like(padded)
    padded[0, :13], real[0, :13] = 0, 0
    options = {"attention_mask": real, "max_new_tokens": 14, "do_sample": False, "num_beams": beams}
    texts = [sparse.generate(padded, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*texts)
    # a row of its own, without padding, says the same
    alone = sparse.generate(padded[:1, 13:], max_new_tokens=14, do_sample=False, num_beams=beams)
    assert torch.equal(alone, texts[0][:1, 13 : 13 + alone.shape[1]])


def test_marks_must_cover_the_cache():
    dense = dense_model("LlamaForCausalLM")
    sparse = sparse_hf.sparsify(dense, "window(8, 0) | marked()", global_token_ids=[5])
    text = documents()[0]
    # one that another model has filled remembers no marks
    first = dense(text[:, :30], use_cache=True)
    past = {"cache": first["cache"]} if "cache" in first else {"past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match=r"cannot be found in a cache; pass global_attention_mask for all keys"):
        sparse(text[:, 30:], **past)
    with pytest.raises(ValueError, match=r"must cover all 50 keys of 1 rows, those in the cache included"):
        sparse(text[:, 30:], **past, global_attention_mask=torch.ones(1, 20))
    first = sparse(text[:, :30], use_cache=True)
    past = {"cache": first["cache"]} if "cache" in first else {"past_key_values": first.past_key_values}
    marks = (text == 5).long()
    got = sparse(text[:, 30:], **past, global_attention_mask=marks).logits
    torch.testing.assert_close(got, sparse(text).logits[:, 30:], **LIMIT)
