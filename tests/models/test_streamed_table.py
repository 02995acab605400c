"""Every causal pattern of the tests' table behind a streaming cache: it answers as one pass does, or says why it has no end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf.kept import Kept, read_kept
from sparse_hf.models.hf.pinning_layer import PinningLayer
from tests.crosses import slow_but_for
from tests.models.families import (
    VOCABULARY,
    dense_model,
    explicit_mask,
    has_two_stacks,
    named_cache,
    one_head,
)
from tests.table import PATTERNS

LLAMA, LIMIT = "LlamaForCausalLM", {"rtol": 1e-4, "atol": 1e-5}
DECODERS = [head for head in one_head(generating=True) if not has_two_stacks(head)]
PIECES = (50, 1, 7, *[1] * 30, 32)
LENGTH = sum(PIECES)
PADDING = torch.tensor([33, 0, 17])
# what has no end, and why
REFUSED = {
    "stride(7)": "stride(7) looks back without end",
    "sparse_transformer(stride=16, mode='strided')": "stride(16) looks back without end",
    "window2d(8, 12, 2, 1) | first(1)": "window2d(8, 12, 2, 1) does not repeat",
    "random_blocks(2, 16, 1)": "random_blocks(2, 16, 1) does not repeat",
    "bigbird(block_size=16)": "random_blocks(3, 16, 0) does not repeat",
    "window(None, None)": "its window has no end",
    "window(None, 3)": "its window has no end",
}
# beside those of the table
MORE = (
    "first(3) | fixed(8, 2)", "fixed(8, 2) & window(100, 0)", "window(9, 0) | marked_keys()",
    "first(2) | window(9, 0) | (marked() & window(40, 0))", "chunk(4) | (first(20) & window(10, 0))",
    "per_head(fixed(6, 1), window(7, 0) | marked_keys(), chunk(4), first(2) | window(3, 0))",
)  # fmt: skip
REFUSED |= {pattern: "does not repeat" for pattern in PATTERNS if pattern.startswith("block_table")}
STREAMED = [p for p in (*PATTERNS, *MORE) if p not in REFUSED]
PINNED = ("fixed(8, 2)", "window(9, 0) | marked_keys()", "window(9, 0) | marked()")
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def text(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(9, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def marks_of(model, real: Tensor, first: int = 0) -> dict[str, Tensor]:
    """Marks of some tokens. Where marked ones see everything, they are among the first of a text."""
    if not model.config.uses_marks:
        return {}
    marks = (torch.rand(real.shape, generator=torch.Generator().manual_seed(1)) < 0.1) & real.bool()
    kept = read_kept(model.config.layer_pattern(0, is_causal=True))
    if isinstance(kept, Kept) and kept.pinned is not None and kept.pinned.queries:
        marks[:, first or PIECES[0] :] = False
    return {"global_attention_mask": marks}


@torch.no_grad()
def in_pieces(model, ids: Tensor, cache, real: Tensor, marks: dict[str, Tensor], sizes=PIECES) -> Tensor:
    answers, begin, places = [], 0, (real.cumsum(1) - 1).clamp(min=0)
    for size in sizes:
        end = begin + size
        given = {name: t[:, begin:end] for name, t in marks.items()}
        if model.config.positions.scheme not in ("alibi", "none"):
            given["position_ids"] = places[:, begin:end]
        mask = {"attention_mask": real[:, :end]}
        answers.append(model(ids[:, begin:end], **named_cache(model, cache), **mask, **given).logits)
        begin = end
    return torch.cat(answers, 1)


@torch.no_grad()
def in_one(model, ids: Tensor, real: Tensor, marks: dict[str, Tensor]) -> Tensor:
    given = {"use_cache": False, "attention_mask": real, **marks}
    if model.config.positions.scheme not in ("alibi", "none"):
        given["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    return model(ids, **given).logits


def real_tokens(padded: bool, rows: int = 3, length: int = LENGTH) -> Tensor:
    padding = PADDING[:rows] if padded else torch.zeros(rows, dtype=torch.long)
    return (torch.arange(length) >= padding[:, None]).long()


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p not in STREAMED])
def test_what_has_no_end_is_named(pattern):
    model = sparse_hf.sparsify(dense_model(LLAMA), pattern)
    with pytest.raises(ValueError) as error:
        StreamingCache(model.config)
    assert REFUSED[pattern] in str(error.value)


@pytest.mark.cross
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", STREAMED)
def test_a_stream_is_one_pass(pattern, padded):
    model, ids, real = sparse_hf.sparsify(dense_model(LLAMA), pattern), text(), real_tokens(padded)
    marks = marks_of(model, real)
    wanted = in_one(model, ids, real, marks)
    cache = StreamingCache(model.config, spare=4)
    found = in_pieces(model, ids, cache, real, marks)
    for row, first in enumerate(PADDING.tolist() if padded else [0] * 3):
        torch.testing.assert_close(found[row, first:], wanted[row, first:], **LIMIT)


@pytest.mark.parametrize("pattern", PINNED)
def test_answers_are_those_of_the_dense_model_under_the_mask(pattern):
    dense, ids = dense_model(LLAMA).double(), text()
    model, real = sparse_hf.sparsify(dense, pattern), real_tokens(False)
    marks = marks_of(model, real)
    of_text = marks.get("global_attention_mask")
    mask = explicit_mask(model.config.layer_pattern(0), LENGTH, real, of_text, is_causal=True)
    with torch.no_grad():
        wanted = dense(ids, attention_mask=mask.expand(3, *mask.shape[1:])).logits
    found = in_pieces(model, ids, StreamingCache(model.config), real, marks)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head", slow_but_for((LLAMA, "GPT2LMHeadModel", "Gemma2ForCausalLM"), DECODERS))
@pytest.mark.parametrize("pattern", ["first(1) | fixed(8, 2)", "window(9, 0) | marked_keys()"])
def test_families(head, pattern):
    model, ids, real = sparse_hf.sparsify(dense_model(head), pattern), text(), real_tokens(True)
    marks = marks_of(model, real)
    found = in_pieces(model, ids, StreamingCache(model.config), real, marks)
    wanted = in_one(model, ids, real, marks)
    for row, first in enumerate(PADDING.tolist()):
        torch.testing.assert_close(found[row, first:], wanted[row, first:], **LIMIT)


def test_only_what_is_marked_is_kept():
    """Memory is that of the marked tokens, and not that of the text."""
    model, held = sparse_hf.sparsify(dense_model(LLAMA), "window(9, 0) | marked_keys()"), []
    for length in (200, 2000):
        ids, marks = text(1, length), torch.zeros(1, length, dtype=torch.bool)
        marks[:, 5:15] = True
        cache = StreamingCache(model.config)
        with torch.no_grad():
            for begin in range(0, length, 50):
                end = begin + 50
                model(ids[:, begin:end], global_attention_mask=marks[:, begin:end], **named_cache(model, cache))
        held.append(sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)))
    assert held[0] == held[1]
    assert all(isinstance(layer, PinningLayer) and layer.count.tolist() == [10] for layer in cache.layers)


@pytest.mark.parametrize("pattern", PINNED[:2])
def test_tokens_are_taken_back(pattern):
    model, ids, real = sparse_hf.sparsify(dense_model(LLAMA), pattern), text(), real_tokens(True)
    marks = marks_of(model, real)
    wanted, cache, at = in_one(model, ids, real, marks), StreamingCache(model.config, spare=16), 0
    for size, back in ((70, 3), (1, 0), (20, 16), (12, 11), (16, 1)):
        part = {name: t[:, at : at + size] for name, t in marks.items()}
        # other tokens, other marks
        wrong = torch.cat((ids[:, at : at + size - back], text(3, back, seed=9)), 1)
        part = {name: t ^ (torch.arange(size) >= size - back) for name, t in part.items()}
        places = (real.cumsum(1) - 1).clamp(min=0)[:, at : at + size]
        given = {"attention_mask": real[:, : at + size], "position_ids": places, **named_cache(model, cache), **part}
        with torch.no_grad():
            found = model(wrong, **given).logits[:, : size - back]
        for row, first in enumerate(PADDING.tolist()):
            begin = max(0, first - at)
            torch.testing.assert_close(found[row, begin:], wanted[row, at : at + size - back][begin:], **LIMIT)
        cache.crop(-back)
        at += size - back


@pytest.mark.cross
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 7}])
@pytest.mark.parametrize("pattern", PINNED)
def test_generation(pattern, way):
    model = sparse_hf.sparsify(dense_model(LLAMA), pattern)
    rows = 1 if "prompt_lookup_num_tokens" in way else 3
    ids, real = text(rows, 40), real_tokens(rows > 1, rows, 40)
    # pieces of a prompt are shorter than the first pass otherwise
    marks = marks_of(model, real, first=7 if "prefill_chunk_size" in way else 40)
    given = {"inputs": ids, "attention_mask": real, **marks, **GREEDY}
    wanted = model.generate(**given, **{name: way[name] for name in way if name == "num_beams"}, use_cache=False)
    assert torch.equal(model.generate(**given, **way, cache_implementation="streaming"), wanted)


@pytest.mark.parametrize("pattern", PINNED)
def test_several_turns_and_forks(pattern):
    model, ids, real = sparse_hf.sparsify(dense_model(LLAMA), pattern), text(2, 40), real_tokens(False, 2, 40)
    cache, marks = StreamingCache(model.config), marks_of(model, real, first=40)
    for turn in range(3):
        given = {name: torch.nn.functional.pad(t, (0, ids.shape[1] - 40)) for name, t in marks.items()}
        wanted = model.generate(ids, **given, use_cache=False, **GREEDY)
        fork = copy.deepcopy(cache)
        for held in (fork, cache):
            assert torch.equal(model.generate(ids, **given, **named_cache(model, held), **GREEDY), wanted)
        ids = torch.cat((wanted, text(2, 5, seed=turn)), 1)


@pytest.mark.compiles
@pytest.mark.parametrize("pattern", slow_but_for((PINNED[0], "ids"), [*PINNED, "ids"]))
def test_one_graph(pattern):
    torch._dynamo.reset()
    graphs = []
    config = CompileConfig(
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True, mode=None, dynamic=False
    )
    config._compile_all_devices = True
    # tokens that are generated are marked too
    named = {"global_token_ids": tuple(range(9, 30))} if pattern == "ids" else {}
    dense = dense_model(LLAMA, num_hidden_layers=1)
    model = sparse_hf.sparsify(dense, PINNED[1] if named else pattern, **named)
    for length in (40, 47):
        ids, real = text(2, length), real_tokens(True, 2, length)
        given = {"inputs": ids, "attention_mask": real, **({} if named else marks_of(model, real, first=40)), **GREEDY}
        wanted = model.generate(**given, use_cache=False)
        found = model.generate(**given, cache_implementation="streaming", compile_config=config)
        assert torch.equal(found, wanted)
    assert len(graphs) == 1


def test_a_marked_token_that_would_see_dropped_keys_is_refused():
    model, ids = sparse_hf.sparsify(dense_model(LLAMA), "window(9, 0) | marked()"), text(1, 60)
    cache, marks = StreamingCache(model.config), torch.zeros(1, 60, dtype=torch.bool)
    marks[:, 3] = marks[:, 50] = True
    with torch.no_grad():
        model(ids[:, :40], global_attention_mask=marks[:, :40], **named_cache(model, cache))
        with pytest.raises(
            ValueError, match=r"behind 40 others is marked, .* all but 9 and the marked ones: .*marked_keys\(\)"
        ):
            model(ids[:, 40:], global_attention_mask=marks[:, 40:], **named_cache(model, cache))
        with pytest.raises(ValueError, match=r"it must cover the 20 new tokens, or all 60"):
            model(ids[:, 40:], global_attention_mask=marks[:, 35:], **named_cache(model, cache))
        # and goes on, with marks of all tokens
        marks[:, 50] = False
        found = model(ids[:, 40:], global_attention_mask=marks, **named_cache(model, cache)).logits
        wanted = model(ids, global_attention_mask=marks, use_cache=False).logits[:, 40:]
    torch.testing.assert_close(found, wanted, **LIMIT)


def test_gradients_are_those_of_one_pass():
    for pattern in PINNED:
        model, ids, real = sparse_hf.sparsify(dense_model(LLAMA), pattern), text(2), real_tokens(False, 2)
        marks, weights = marks_of(model, real), list(model.parameters())
        wanted = torch.autograd.grad(model(ids, use_cache=False, **marks).logits.square().sum(), weights)
        cache, answers, begin = StreamingCache(model.config), [], 0
        for size in (PIECES[0], 1, 40, 29):
            part = {name: t[:, begin : begin + size] for name, t in marks.items()}
            answers.append(model(ids[:, begin : begin + size], **part, **named_cache(model, cache)).logits)
            begin += size
        assert begin == LENGTH
        found = torch.autograd.grad(torch.cat(answers, 1).square().sum(), weights)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_positions_of_a_cache_are_those_of_windows():
    model = sparse_hf.sparsify(dense_model(LLAMA), "first(2) | fixed(8, 2)")
    with pytest.raises(ValueError, match=r"layer 0 keeps others too: .*use positions='true'"):
        StreamingCache(model.config, positions="cache")
    assert StreamingCache(model.config, positions="auto").turns_from is None
