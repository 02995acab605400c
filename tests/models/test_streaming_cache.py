"""A cache that drops keys answers as one that drops none, as no cache, and as the dense model under the pattern's mask."""

from __future__ import annotations

import copy
import logging
from itertools import cycle

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf.answered import remember_slots
from sparse_hf.models.hf.cache import logger as cache_logger
from sparse_hf.models.hf.streaming_cache import SPARE
from sparse_hf.testing import AllocationInterceptor
from tests.crosses import slow_but_for
from tests.models.families import (
    VOCABULARY,
    dense_model,
    explicit_mask,
    has_two_stacks,
    named_cache,
    one_head,
)

LLAMA, SPARSE = "LlamaForCausalLM", "window(20, 0) | first(3)"
# odd pieces, single tokens among them, fewer than there are sinks at first
PIECES = (2, 1, 1, 31, 1, 5, *[1] * 24, 25)
LIMIT = {"rtol": 1e-4, "atol": 1e-5}
DECODERS = [head for head in one_head(generating=True) if not has_two_stacks(head)]
PATTERNS = [
    SPARSE,
    "window(20, 0)",
    "window(0, 0) | first(5)",
    "window(300, 0) | first(3)",
    # sinks that are out of sight in the end
    "window(9, 0) | (first(4) & window(40, 0))",
    "per_head(window(20, 0) | first(3), window(7, 0), first(4) | window(9, 0), window(20, 0))",
    "streaming(window=16, sinks=2)",
    "chunk(16)",
    "chunk(7, 1) | first(3)",
    "stride(3) & window(24, 0) | first(1)",
    "per_head(chunk(6), window(7, 0), first(4) | window(9, 0), fixed(10, 0))",
]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def sparse_model(head: str = LLAMA, pattern: str = SPARSE, **layers):
    return sparse_hf.sparsify(dense_model(head), pattern, **layers)


def text(rows: int = 2, length: int = 90) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


@torch.no_grad()
def in_pieces(model, ids: Tensor, cache, real: Tensor | None = None, pieces=PIECES) -> Tensor:
    """The answers to all tokens, piece by piece."""
    answers, begin, sizes, given = [], 0, cycle(pieces), named_cache(model, cache)
    while begin < ids.shape[1]:
        end = begin + next(sizes)
        if real is not None:
            positions = (real[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
            given |= {"attention_mask": real[:, :end], "position_ids": positions}
        answers.append(model(ids[:, begin:end], **given).logits)
        begin = end
    return torch.cat(answers, 1)


def held_bytes(cache) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_those_of_the_dense_model_under_the_mask(pattern):
    dense, ids = dense_model(LLAMA), text()
    sparse = sparse_hf.sparsify(dense, pattern)
    mask = explicit_mask(sparse.config.layer_pattern(0), ids.shape[1], torch.ones_like(ids), None, is_causal=True)
    with torch.no_grad():
        wanted = dense(ids, attention_mask=mask.expand(len(ids), *mask.shape[1:])).logits
    torch.testing.assert_close(in_pieces(sparse, ids, StreamingCache(sparse.config)), wanted, **LIMIT)


@pytest.mark.parametrize("backend", ["sparse_reference", "sparse_blockwise"])
@pytest.mark.parametrize("pattern", [SPARSE, PATTERNS[5]])
def test_answers_on_any_backend(pattern, backend):
    sparse, ids = sparse_model(pattern=pattern), text()
    wanted = sparse(ids, use_cache=False).logits
    sparse.set_attn_implementation(backend)
    torch.testing.assert_close(in_pieces(sparse, ids, StreamingCache(sparse.config)), wanted, **LIMIT)


# families with windows of their own have layers with different ones, and masks for each kind
@pytest.mark.parametrize(
    "head", slow_but_for((LLAMA, "Gemma3ForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM"), DECODERS)
)
def test_families(head):
    sparse, ids = sparse_model(head), text()
    cache = StreamingCache(sparse.config)
    found = in_pieces(sparse, ids, cache)
    torch.testing.assert_close(found, in_pieces(sparse, ids, DynamicCache()), **LIMIT)
    torch.testing.assert_close(found, sparse(ids, use_cache=False).logits, **LIMIT)
    assert cache.get_seq_length() == ids.shape[1]
    assert all(layer.keys.shape[2] == layer.ring.slots < ids.shape[1] for layer in cache.layers)


@pytest.mark.parametrize(
    "layers",
    [["window(40, 0) | first(1)", "window(9, 0) | first(12)"], {0: "dense"}, {1: "dense"}, ["chunk(8)", "dense"]],
)
def test_layers_with_different_patterns(layers):
    sparse, ids = sparse_model(layers=layers), text(length=300)
    found = in_pieces(sparse, ids, StreamingCache(sparse.config))
    torch.testing.assert_close(found, sparse(ids, use_cache=False).logits, **LIMIT)


def test_a_layer_that_sees_all_keeps_all_and_the_others_drop():
    sparse = sparse_model(layers={1: "dense"})
    cache = StreamingCache(sparse.config)
    in_pieces(sparse, text(1, 600), cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [3 + 20 + SPARE, 1024]


# some rows have padding alone in the first pieces
@pytest.mark.cross
@pytest.mark.parametrize("pieces", [(40, 1, 13, *[1] * 25, 11), (90,), (35,), (10,), (18, 1)])
@pytest.mark.parametrize("pattern", [SPARSE, *PATTERNS[4:6], *PATTERNS[8:], "dense"])
def test_padded_rows_answer_as_they_do_alone(pattern, pieces):
    layers = {"layers": {0: "dense"}} if pattern == "dense" else {}
    sparse, ids = sparse_model(pattern=SPARSE if layers else pattern, **layers), text(3)
    padding = torch.tensor([33, 0, 17])
    real = (torch.arange(ids.shape[1]) >= padding[:, None]).long()
    found = in_pieces(sparse, ids, StreamingCache(sparse.config), real, pieces)
    for row, first in enumerate(padding.tolist()):
        alone = sparse(ids[row : row + 1, first:], use_cache=False).logits
        torch.testing.assert_close(found[row : row + 1, first:], alone, **LIMIT)


@pytest.mark.parametrize(
    ("head", "way"),
    [
        (LLAMA, {}),
        (LLAMA, {"num_beams": 3}),
        (LLAMA, {"num_beams": 2, "do_sample": True}),
        ("MistralForCausalLM", {}),
    ],
)
def test_generation(head, way):
    sparse, ids = sparse_model(head), text(length=60)
    real = torch.ones_like(ids)
    ids[0, :13], real[0, :13] = 0, 0
    for given in ({"inputs": ids, "attention_mask": real}, {"inputs": ids[1:]}):
        texts = []
        for cache in (StreamingCache(sparse.config), DynamicCache()):
            torch.manual_seed(5)
            texts.append(sparse.generate(**given, **named_cache(sparse, cache), **{**GREEDY, **way}))
        assert torch.equal(*texts)


def test_generation_goes_on_and_begins_anew():
    sparse, ids = sparse_model(), text(1, 60)
    cache, wanted = StreamingCache(sparse.config), sparse.generate(ids, use_cache=False, **GREEDY)
    begun = sparse.generate(ids, **named_cache(sparse, cache), **{**GREEDY, "max_new_tokens": 5, "min_new_tokens": 5})
    rest = {**GREEDY, "max_new_tokens": 7, "min_new_tokens": 7}
    assert torch.equal(sparse.generate(begun, **named_cache(sparse, cache), **rest), wanted)
    cache.reset()
    assert torch.equal(sparse.generate(ids, **named_cache(sparse, cache), **GREEDY), wanted)


def test_rows_of_a_batch_can_be_chosen_and_repeated():
    sparse, ids = sparse_model(), text(3, 140)
    cache = StreamingCache(sparse.config)
    in_pieces(sparse, ids[:, :100], cache, pieces=(50,))
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = ids[[2, 2, 0, 0]]
    with torch.no_grad():
        found = sparse(rows[:, 100:], **named_cache(sparse, cache)).logits
    torch.testing.assert_close(found, sparse(rows, use_cache=False).logits[:, 100:], **LIMIT)


@pytest.mark.parametrize("pattern", [SPARSE, PATTERNS[4]])
def test_memory_does_not_grow(pattern):
    sparse, ids, window = sparse_model(pattern=pattern), text(1, 41 * 41), 41
    cache, made = StreamingCache(sparse.config), []
    for windows in (4, 40):
        seen = cache.get_seq_length()
        in_pieces(sparse, ids[:, seen : windows * window], cache, pieces=(window,))
        with AllocationInterceptor(length=10**9) as interceptor:
            in_pieces(sparse, ids[:, windows * window :][:, :3], cache, pieces=(1,))
        made.append((held_bytes(cache), interceptor.largest))
    assert made[0] == made[1]
    # two layers of keys and values of 2 heads of 8 numbers, in float32
    layer = cache.layers[0]
    assert made[0][0] == 2 * 2 * 2 * 8 * 4 * (layer.kept.sinks + layer.kept.left + SPARE)


def test_a_long_prompt_is_not_kept_alive():
    sparse = sparse_model()
    cache = StreamingCache(sparse.config)
    in_pieces(sparse, text(1, 500), cache, pieces=(500,))
    assert held_bytes(cache) == 2 * 2 * 2 * 8 * 4 * (3 + 20 + SPARE)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "window(None, None)",
            "layer 0 has the pattern window(None, None) & window(None, 0): its window has no end. A StreamingCache drops",
        ),
        ("window(9, 0) | stride(4)", "stride(4) looks back without end. A StreamingCache"),
        ("window(9, 0) | stride(4)", "use a DynamicCache, which keeps all, or another pattern"),
        ("window(9, 0) & outside(marked())", "marks take pairs away"),
        ("window(9, 0) | lsh(8, 1)", "its keys are chosen by what they hold"),
        ("window(90, 0) & random_blocks(2, 4)", "random_blocks(2, 4, 0) does not repeat"),
        ("per_head(window(9, 0), window(9, 0), window(9, 0), stride(2))", "stride(2) looks back without end"),
    ],
)
def test_refuses_patterns_that_look_back_anywhere(pattern, message):
    config = sparse_model(pattern=pattern).config
    with pytest.raises(ValueError) as error:
        StreamingCache(config)
    assert message in str(error.value)


def test_refuses_who_is_no_sparse_decoder():
    with pytest.raises(ValueError, match=r"LlamaConfig is that of a dense one; use `sparse_hf.sparsify"):
        StreamingCache(dense_model(LLAMA).config)
    with pytest.raises(ValueError, match=r"made of a configuration, and got a SparseLlama\w+; give its .config"):
        StreamingCache(sparse_model())
    bart = sparse_hf.sparsify(dense_model("BartForConditionalGeneration"), SPARSE)
    with pytest.raises(ValueError, match=r"sparse_bart has encoder and decoder; use a DynamicCache"):
        StreamingCache(bart.config)


def test_refuses_another_models_cache():
    wide, ids = sparse_model(pattern="window(30, 0)"), text()
    with pytest.raises(ValueError, match=r"make it of this model's own configuration, StreamingCache\(model.config\)"):
        in_pieces(wide, ids, StreamingCache(sparse_model().config))


def test_refuses_a_cache_whose_later_layers_keep_other_keys():
    """Layers that ask alike go by the answer of the first, if the cache keeps the same for all of them; here as many slots."""
    ids, other = text(), sparse_model(layers={1: "window(23, 0)"})
    cache = StreamingCache(other.config)
    with torch.no_grad():
        other(ids, **named_cache(other, cache))
        with pytest.raises(ValueError, match=r"and the pattern of layer 1 is"):
            sparse_model()(ids[:, :1], **named_cache(other, cache))


@torch.no_grad()
@pytest.mark.parametrize(("layers", "found"), [({}, 1), ({0: "window(9, 0)"}, 2)])
def test_layers_that_ask_alike_are_found_out_about_once(layers, found, monkeypatch):
    model, ids = sparse_model(layers=layers), text()
    right = model(ids).logits[:, -1]
    cache, calls = StreamingCache(model.config), []
    model(ids[:, :-1], **named_cache(model, cache))
    monkeypatch.setattr(
        "sparse_hf.models.hf.attention_interface.remember_slots",
        lambda *given, go_on=remember_slots: (calls.append(1), go_on(*given)),
    )
    got = model(ids[:, -1:], **named_cache(model, cache)).logits[:, -1]
    torch.testing.assert_close(got, right, **LIMIT)
    assert len(calls) == found


def test_refuses_padding_that_it_cannot_keep_apart():
    sparse, ids = sparse_model(), text(2, 50)
    real = torch.ones_like(ids)
    for row, columns in ((0, slice(40, None)), (1, slice(20, 25))):
        holed = real.clone()
        holed[row, columns] = 0
        with pytest.raises(ValueError, match="padding behind real tokens"):
            in_pieces(sparse, ids, StreamingCache(sparse.config), holed, pieces=(50,))
    late = real.clone()
    late[0, :30] = 0
    cache = StreamingCache(sparse.config)
    with torch.no_grad():
        sparse(ids[:, :25], attention_mask=real[:, :25], **named_cache(sparse, cache))
    with pytest.raises(ValueError, match=r"has \[30, 0\] tokens of padding .* has seen \[0, 0\] of them"):
        sparse(ids[:, 25:], attention_mask=late, **named_cache(sparse, cache))
    given = named_cache(sparse, StreamingCache(sparse.config))
    for mask in (real[:, :40], torch.ones(2, 1, 50, 50, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"it must be \[batch, 50\], a number for each token so far"):
            sparse(ids, attention_mask=mask, **given)


@pytest.mark.parametrize("pattern", [SPARSE, PATTERNS[4], PATTERNS[7]])
def test_takes_tokens_back(pattern):
    sparse, ids = sparse_model(pattern=pattern), text(2, 140)
    with torch.no_grad():
        wanted = sparse(ids, use_cache=False).logits
        cache = StreamingCache(sparse.config, spare=16)
        wrong = ids.flip(0)
        for begin, size, taken in ((0, 70, 3), (67, 1, 0), (68, 20, 16), (72, 40, 9), (103, 20, 1), (122, 18, 0)):
            end = begin + size - taken
            given = torch.cat((ids[:, begin:end], wrong[:, end : end + taken]), 1)
            found = sparse(given, **named_cache(sparse, cache)).logits
            torch.testing.assert_close(found[:, : size - taken], wanted[:, begin:end], **LIMIT)
            cache.crop(-taken)
            assert cache.get_seq_length() == end


def test_holds_no_more_than_the_pattern_sees():
    sparse = sparse_model(pattern="window(20, 0) | first(3)")
    cache = StreamingCache(sparse.config)
    in_pieces(sparse, text(1, 90), cache)
    assert all(layer.keys.shape[2] == 3 + 20 + SPARE for layer in cache.layers)
    cache.crop(-1)
    assert cache.get_seq_length() == 89


def test_refuses_to_take_back_more_than_it_can():
    sparse, ids = sparse_model(), text(1, 90)
    cache = StreamingCache(sparse.config, spare=5)
    in_pieces(sparse, ids[:, :50], cache)
    cache.crop(-3)
    with pytest.raises(ValueError, match=r"can take back 2 of 47 tokens. Nothing was changed; .*spare=3"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="give a negative number"):
        cache.crop(3)
    with pytest.raises(ValueError, match="spare is 0; it must be a whole number of at least 1"):
        StreamingCache(sparse.config, spare=0)
    # and goes on
    with torch.no_grad():
        found = sparse(ids[:, 47:], **named_cache(sparse, cache)).logits
        torch.testing.assert_close(found, sparse(ids, use_cache=False).logits[:, 47:], **LIMIT)
        cache.reset()
        sparse(ids[:, :20], **named_cache(sparse, cache))
        # nothing was dropped by then
        cache.crop(-20)


def test_takes_its_arguments_by_position():
    sparse = sparse_hf.sparsify(dense_model("LlamaModel"), SPARSE)
    ids, cache = text(), StreamingCache(sparse.config)
    real = torch.ones_like(ids)
    with torch.no_grad():
        sparse(ids[:, :70], real[:, :70], None, cache)
        found = sparse(ids[:, 70:], real, None, cache)[0]
    torch.testing.assert_close(found, sparse(ids, use_cache=False)[0][:, 70:], **LIMIT)


@pytest.mark.compiles
@pytest.mark.slow
def test_a_compiled_model():
    torch._dynamo.reset()
    sparse, ids = sparse_model(), text(length=60)
    wanted = sparse.generate(ids, use_cache=False, **GREEDY)
    sparse.forward = torch.compile(sparse.forward, backend="eager")
    assert torch.equal(sparse.generate(ids, **named_cache(sparse, StreamingCache(sparse.config)), **GREEDY), wanted)


@pytest.mark.parametrize("pattern", [SPARSE, "window(20, 0)", "window(9, 0) | (first(4) & window(40, 0))"])
@pytest.mark.parametrize("head", [LLAMA, "GPT2LMHeadModel"])
def test_gradients_are_those_of_one_pass(head, pattern):
    sparse, ids = sparse_model(head, pattern), text()
    weights = list(sparse.parameters())
    wanted = torch.autograd.grad(sparse(ids, use_cache=False).logits.square().sum(), weights)
    cache, answers, begin = StreamingCache(sparse.config), [], 0
    for size in (7, 1, 1, 31, 1, 49):
        answers.append(sparse(ids[:, begin : begin + size], **named_cache(sparse, cache)).logits)
        begin += size
    assert begin == ids.shape[1]
    found = torch.autograd.grad(torch.cat(answers, 1).square().sum(), weights)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_prompt_read_in_inference_mode():
    sparse, ids = sparse_model(), text()
    cache = StreamingCache(sparse.config)
    with torch.inference_mode():
        sparse(ids[:, :50], **named_cache(sparse, cache))
    with torch.no_grad():
        found = sparse(ids[:, 50:], **named_cache(sparse, cache)).logits
        torch.testing.assert_close(found, sparse(ids, use_cache=False).logits[:, 50:], **LIMIT)


MODES = (torch.enable_grad, torch.inference_mode, torch.no_grad)


@pytest.mark.parametrize("pattern", [SPARSE, "fixed(8, 2)", "summary(8, 2) | window(9, 0)"])
@pytest.mark.parametrize("pieces", [(20, 1, 1), (3, 25, 7)])
def test_modes_in_turn(pattern, pieces):
    sparse, ids = sparse_model(pattern=pattern), text()
    cache, begin = StreamingCache(sparse.config), 0
    wanted = sparse(ids, use_cache=False).logits
    for mode, size in zip(MODES * 2, pieces * 2, strict=True):
        with mode():
            found = sparse(ids[:, begin : begin + size], **named_cache(sparse, cache)).logits
            torch.testing.assert_close(found, wanted[:, begin : begin + size], **LIMIT)
        begin += size


@pytest.mark.parametrize("pattern", [SPARSE, "summary(8, 2) | window(9, 0)"])
@pytest.mark.parametrize("change", [copy.deepcopy, "batch_select_indices", "batch_repeat_interleave", "reorder_cache"])
def test_changed_in_inference_mode_and_used_in_another(pattern, change):
    sparse, ids = sparse_model(pattern=pattern), text(1)
    cache = StreamingCache(sparse.config)
    with torch.no_grad():
        sparse(ids[:, :50], **named_cache(sparse, cache))
    with torch.inference_mode():
        if callable(change):
            cache = change(cache)
        else:
            getattr(cache, change)(1 if "repeat" in change else torch.tensor([0]))
    with torch.no_grad():
        found = [sparse(ids[:, a:b], **named_cache(sparse, cache)).logits for a, b in ((50, 51), (51, 90))]
        cache.crop(-1)
        torch.testing.assert_close(torch.cat(found, 1), sparse(ids, use_cache=False).logits[:, 50:], **LIMIT)


@pytest.mark.parametrize("rows", [1, 3])
def test_refuses_another_number_of_rows(rows):
    sparse = sparse_model()
    cache = StreamingCache(sparse.config)
    sparse.generate(text(2, 40), **named_cache(sparse, cache), **GREEDY)
    with pytest.raises(ValueError, match=rf"of 2 rows, and this batch has {rows}: begin anew with cache.reset\(\)"):
        sparse.generate(text(rows, 90), **named_cache(sparse, cache), **GREEDY)
    cache.reset()
    sparse.generate(text(rows, 90), **named_cache(sparse, cache), **GREEDY)


def test_says_once_that_positions_have_an_end(caplog):
    logging.getLogger("sparse_hf").propagate = True
    sparse, short = sparse_model(), sparse_hf.sparsify(dense_model(LLAMA, max_position_embeddings=64), SPARSE)
    cache_logger.warning_once.cache_clear()
    for model, times in ((sparse, 0), (short, 1)):
        in_pieces(model, text(1, 90), StreamingCache(model.config))
        assert caplog.text.count("behind a StreamingCache has more tokens than") == times


@pytest.mark.parametrize("pattern", ["window(20, 0) | first(3)", "window(20, 0) | marked_keys() | summary(16, 2)"])
def test_cuda_graphs_go_on_with_a_cache_that_was_changed(pattern):
    """They are skipped for keys of which nobody says that they stay where they are."""
    sparse = sparse_model(pattern=pattern)

    def stays(cache) -> bool:
        tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        return len(tensors) >= 3 * len(cache.layers) and all(hasattr(t, "_dynamo_static_input_type") for t in tensors)

    cache, ids = StreamingCache(sparse.config), text(2, 90)
    in_pieces(sparse, ids[:, :60], cache)
    assert stays(cache) and stays(copy.deepcopy(cache))
    changes = (
        lambda: cache.activate_past_recording(), lambda: cache.crop(-1), lambda: cache.make_room(900),
        lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda: cache.reorder_cache(torch.tensor([1, 0])), lambda: in_pieces(sparse, ids[:, 59:], cache), lambda: cache.reset(),
    )  # fmt: skip
    for change in changes:
        change()
        assert stays(cache)
