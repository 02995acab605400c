"""What `generate` allows: embeddings, caches of the user's, marks, prompts in pieces; each as without a cache.

The kinds: a signature that hides an argument, caches that are emptied or made shorter, marks that a step does not cover, a
dense class that throws the user's cache away. Compared with `use_cache=False`, or with the dense class. Looked at: every
family that generates, encoder-decoders among them; dynamic, static, offloaded and streaming caches; beams; pieces.
"""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf.streaming_cache import SPARE
from tests.crosses import slow_but_for
from tests.models.families import VOCABULARY, dense_model, has_two_stacks, named_cache, one_head

LLAMA, MISTRAL, SPARSE = "LlamaForCausalLM", "MistralForCausalLM", "window(20, 0) | first(3)"
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
LOGITS = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
LIMIT = {"rtol": 1e-4, "atol": 1e-5}
GENERATING = one_head(generating=True)
DECODERS = [head for head in GENERATING if not has_two_stacks(head)]
SLIDING = [MISTRAL, "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Qwen2ForCausalLM", "Cohere2ForCausalLM"]


def text(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def sparse_model(head: str = LLAMA, pattern: str = SPARSE, **more):
    layers = {"layers": {"decoder": SPARSE}} if has_two_stacks(head) else {}
    return sparse_hf.sparsify(dense_model(head), pattern, **layers, **more)


def tail(model, **kwargs) -> Tensor:
    return torch.stack(model.generate(**kwargs, **LOGITS).logits)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "head", slow_but_for([LLAMA, "GPT2LMHeadModel", "Gemma3ForCausalLM", "BartForConditionalGeneration"], GENERATING)
)
def test_from_embeddings(head, beams):
    model, ids = sparse_model(head), text(2, 40)
    if "inputs_embeds" not in model.forward.__signature__.parameters:
        pytest.skip("the dense class takes none")
    wanted = model.generate(ids, num_beams=beams, **GREEDY)
    embeddings = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeddings, num_beams=beams, **GREEDY)
    assert torch.equal(found, wanted if has_two_stacks(head) else wanted[:, 40:])


@pytest.mark.parametrize("kind", ["streaming", "static", "marked"])
def test_from_embeddings_with_caches_and_marks(kind):
    pattern, ids = "window(5, 0) | marked()" if kind == "marked" else SPARSE, text(2, 40)
    model = sparse_model(LLAMA, pattern)
    marks = torch.zeros_like(ids)
    marks[:, [3, 17]] = 1
    given = {
        "streaming": lambda: named_cache(model, StreamingCache(model.config)),
        "static": lambda: {"cache_implementation": "static"},
        "marked": lambda: {"global_attention_mask": marks},
    }[kind]
    plain = {"global_attention_mask": marks} if kind == "marked" else {}
    wanted = model.generate(ids, use_cache=False, **plain, **GREEDY)[:, 40:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **given(), **GREEDY), wanted)


@pytest.mark.parametrize("head", DECODERS)
def test_generate_reads_what_the_dense_class_takes(head):
    import inspect

    sparse = sparse_hf.models.sparse_class(head) if hasattr(sparse_hf.models, "sparse_class") else None
    sparse = sparse or getattr(sparse_hf, f"Sparse{head}")
    dense = sparse_hf.models.dense_class(sparse)
    of_sparse, of_dense = (inspect.signature(c.prepare_inputs_for_generation) for c in (sparse, dense))
    assert list(of_sparse.parameters) == list(of_dense.parameters)


@pytest.mark.cross
@pytest.mark.parametrize("of", ["dense", "sparse"])
@pytest.mark.parametrize("prefix", [20, 35, 60])
@pytest.mark.parametrize("head", SLIDING)
def test_new_tokens_behind_a_prefix(head, prefix, of):
    dense, ids = dense_model(head), text(1, 75)
    model = sparse_hf.sparsify(dense, SPARSE)
    cache = DynamicCache(config=(dense if of == "dense" else model).config)
    with torch.no_grad():
        model(ids[:, :prefix], **named_cache(model, cache))
    assert cache.get_seq_length() == prefix and not any(cache.is_sliding)
    given = {"attention_mask": torch.ones_like(ids), **named_cache(model, cache)}
    torch.testing.assert_close(
        tail(model, inputs=ids[:, prefix:], **given), tail(model, inputs=ids, use_cache=False), **LIMIT
    )


@pytest.mark.cross
@pytest.mark.parametrize("of", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
@pytest.mark.parametrize("head", [LLAMA, MISTRAL, "Gemma3ForCausalLM"])
def test_three_turns_in_a_cache_of_the_users(head, kind, of):
    dense = dense_model(head)
    model = sparse_hf.sparsify(dense, SPARSE)
    config = (dense if of == "dense" else model).config
    make = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=200),
        "offloaded": lambda: DynamicCache(config=config, offloading=True),
    }[kind]
    if kind == "offloaded" and not torch.cuda.is_available():
        pytest.skip("Transformers offloads from a GPU")
    cache, history = make(), text(1, 60)
    for turn in range(3):
        wanted = model.generate(history, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(history, **named_cache(model, cache), **GREEDY), wanted), turn
        history = torch.cat([wanted, text(1, 10, turn)], 1)


@pytest.mark.parametrize("of", ["dense", "sparse"])
def test_a_static_cache_by_hand(of):
    dense, ids = dense_model(MISTRAL), text(2, 90)
    model = sparse_hf.sparsify(dense, SPARSE)
    cache = StaticCache(config=(dense if of == "dense" else model).config, max_cache_len=100)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        for begin, end in ((0, 50), (50, 51), (51, 90)):
            found = model(ids[:, begin:end], **named_cache(model, cache)).logits
            torch.testing.assert_close(found, wanted[:, begin:end], **LIMIT)


def test_a_cache_that_has_dropped_keys_says_so():
    dense = dense_model(MISTRAL)
    model, ids, cache = sparse_hf.sparsify(dense, SPARSE), text(1, 70), DynamicCache(config=dense.config)
    with torch.no_grad():
        dense(ids[:, :60], **named_cache(dense, cache))
        with pytest.raises(ValueError, match="has dropped 21 of 60 tokens, which a pattern may still see"):
            model(ids[:, 60:], **named_cache(model, cache))
    with pytest.raises(ValueError, match="has dropped 21 of 60 tokens"):
        model.generate(ids, **named_cache(model, cache), **GREEDY)


@pytest.mark.parametrize("head", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_caches_of_encoder_decoders(head):
    model, ids = sparse_model(head), text(2, 40)
    wanted = model.generate(ids, use_cache=False, **GREEDY)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    assert torch.equal(model.generate(ids, **named_cache(model, cache), **GREEDY), wanted)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), wanted)


MARKED = "window(5, 0) | marked()"


def marked(ids: Tensor) -> Tensor:
    marks = torch.zeros_like(ids)
    marks[:, [3, 17]] = 1
    return marks


@pytest.mark.cross
@pytest.mark.parametrize("by", ["mask", "ids", "both"])
@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 16}, {"num_beams": 3}])
@pytest.mark.parametrize("head", [LLAMA, "GPT2LMHeadModel", MISTRAL])
def test_marks(head, way, by):
    ids = text(2, 40)
    named = [] if by == "mask" else [*ids[0, 8:10].tolist(), 5]
    model = sparse_model(head, MARKED, global_token_ids=named)
    given = {} if by == "ids" else {"global_attention_mask": marked(ids)}
    beams = {"num_beams": way.get("num_beams", 1)}
    wanted = model.generate(ids, use_cache=False, **given, **beams, **GREEDY)
    assert torch.equal(model.generate(ids, **given, **way, **GREEDY), wanted)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("by", ["whole", "new", "none", "ids"])
def test_marks_of_new_tokens_only(by, beams):
    ids = text(2, 45)
    model = sparse_model(LLAMA, MARKED, global_token_ids=ids[0, 8:10].tolist() if by == "ids" else [])
    marks, cache = marked(ids), DynamicCache()
    marks[:, 40] = by != "none"
    first = {} if by == "ids" else {"global_attention_mask": marks[:, :35]}
    whole = {} if by == "ids" else {"global_attention_mask": marks}
    with torch.no_grad():
        model(ids[:, :35], **first, **named_cache(model, cache))
    cache.batch_repeat_interleave(beams)
    given = {"whole": whole, "new": {"global_attention_mask": marks[:, 35:]}}.get(by, {})
    beams = {"num_beams": beams}
    wanted = model.generate(ids, use_cache=False, **whole, **beams, **GREEDY)[:, 45:]
    given |= {"attention_mask": torch.ones_like(ids), **named_cache(model, cache)}
    assert torch.equal(model.generate(ids[:, 35:], **given, **beams, **GREEDY)[:, 10:], wanted)


@pytest.mark.cross
@pytest.mark.parametrize("by", ["mask", "ids", "both"])
@pytest.mark.parametrize("way", ["assistant", "lookup"])
@pytest.mark.parametrize("head", [LLAMA, MISTRAL])
def test_marks_with_tokens_that_are_taken_back(head, way, by):
    """An assistant is given the marks of the first prompt in every round; what it drafts is cut off its cache again."""
    ids = text(1, 40).repeat(1, 2)
    named = [] if by == "mask" else [*ids[0, 8:10].tolist(), 5]
    model, assistant = (sparse_model(head, MARKED, global_token_ids=named) for _ in range(2))
    # one that drafts what is accepted only in part
    assistant.get_output_embeddings().weight.data[50:] = 0
    given = {} if by == "ids" else {"global_attention_mask": marked(ids)}
    wanted = model.generate(ids, use_cache=False, **given, **GREEDY)
    how = {"prompt_lookup_num_tokens": 3} if way == "lookup" else {"assistant_model": assistant}
    assert torch.equal(model.generate(ids, **how, **given, **GREEDY), wanted)


def test_marks_by_hand_are_remembered():
    ids, model = text(2, 45), sparse_model(LLAMA, MARKED)
    marks, cache = marked(ids), DynamicCache()
    marks[:, 40] = 1
    with torch.no_grad():
        wanted = model(ids, global_attention_mask=marks, use_cache=False).logits
        for begin, end in ((0, 20), (20, 36), (36, 45)):
            given = {"global_attention_mask": marks[:, begin:end], **named_cache(model, cache)}
            torch.testing.assert_close(model(ids[:, begin:end], **given).logits, wanted[:, begin:end], **LIMIT)


def test_marks_of_another_length_are_refused():
    ids, model = text(2, 45), sparse_model(LLAMA, MARKED)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :35], global_attention_mask=marked(ids)[:, :35], **named_cache(model, cache))
    given = {"attention_mask": torch.ones_like(ids), "global_attention_mask": marked(ids)[:, :7]}
    with pytest.raises(ValueError, match="it must cover all 45 tokens of the prompt"):
        model.generate(ids[:, 35:], **given, **named_cache(model, cache), **GREEDY)


@pytest.mark.parametrize("name", ["global_attn_mask", "global_mask", "gloabl_attention_mask", "global_attention_masks"])
def test_a_misspelt_mask_is_refused(name):
    ids = text(2, 20)
    for head in (LLAMA, "BertModel", "BartModel"):
        layers = {"layers": {"decoder": SPARSE}} if head == "BartModel" else {}
        model = sparse_hf.sparsify(dense_model(head), MARKED.replace("5, 0", "5, 5"), **layers)
        with pytest.raises((ValueError, TypeError), match=name):
            model(ids, **{name: marked(ids)})
    with pytest.raises(ValueError, match=name):
        sparse_model(LLAMA, MARKED).generate(ids, **{name: marked(ids)})


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("head", [LLAMA, "GPT2LMHeadModel", "BartForConditionalGeneration"])
def test_a_cache_by_either_name_is_used_or_refused(head):
    """Older versions know the older name only, and the dense class forgets what is given by the newer one."""
    model, ids = sparse_model(head), text(1, 12)
    given = {"input_ids": ids} if not has_two_stacks(head) else {"input_ids": ids, "decoder_input_ids": ids}
    for name in ("cache", "past_key_values"):
        cache = DynamicCache()
        cache = EncoderDecoderCache(cache, DynamicCache()) if has_two_stacks(head) else cache
        with torch.no_grad():
            if name == "cache" and name not in model.forward.__signature__.parameters:
                with pytest.raises(
                    ValueError, match="no argument 'cache' in this version of Transformers, which calls it past_key"
                ):
                    model(**given, **{name: cache})
            else:
                model(**given, **{name: cache})
                assert cache.get_seq_length() == 12


def test_nothing_marked_is_said_once(caplog):
    logger = logging.getLogger("sparse_hf")
    transformers.utils.logging.get_logger("sparse_hf.models.hf.marks").warning_once.cache_clear()
    logger.propagate, ids = True, text(2, 20)
    model = sparse_model(LLAMA, MARKED)
    with torch.no_grad():
        model(ids, global_attention_mask=marked(ids))
        assert "nothing is marked" not in caplog.text
        model(ids), model(ids)
    assert caplog.text.count("nothing is marked") == 1


@pytest.mark.parametrize("head", ["BigBirdModel", "BigBirdPegasusModel"])
def test_published_models_that_mark_nothing_are_left_in_peace(head, caplog):
    transformers.utils.logging.get_logger("sparse_hf.models.hf.marks").warning_once.cache_clear()
    logging.getLogger("sparse_hf").propagate = True
    dense, ids = dense_model(head, attention_type="block_sparse", block_size=8, num_random_blocks=1), text(1, 70)
    layers = {"layers": {"decoder": SPARSE}} if has_two_stacks(head) else {}
    with torch.no_grad():
        sparse_hf.sparsify(dense)(ids)
        assert "nothing is marked" not in caplog.text
        sparse_hf.sparsify(dense, "chunk(8, 1, 1) | marked()", **layers)(ids)
    assert caplog.text.count("nothing is marked") == 1


def longrope(**changes):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64, "factor": 8.0,
    }  # fmt: skip
    return dense_model(
        "Phi3ForCausalLM", sliding_window=None, original_max_position_embeddings=64, rope_parameters=rope, **changes
    )


@pytest.mark.cross
@pytest.mark.parametrize("length", [40, 60, 100])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static", "streaming"])
def test_angles_that_change_keep_the_cache(kind, length):
    """Of Phi-3, whose keys are computed again beyond the length that it was trained on first."""
    model, ids = sparse_hf.sparsify(longrope(), SPARSE), text(1, length)
    made = {
        "none": lambda: None,
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=200),
        "streaming": lambda: StreamingCache(model.config),
    }[kind]()
    long = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    wanted = model.generate(ids, use_cache=False, **long)
    given = {} if made is None else named_cache(model, made)
    found = model.generate(ids, **given, **long, return_dict_in_generate=True)
    assert torch.equal(found.sequences, wanted)
    if made is not None:
        assert made.get_seq_length() == length + 19
        assert kind != "streaming" or {layer.keys.shape[2] for layer in made.layers} == {3 + 20 + SPARE}


def test_angles_that_change_want_the_whole_text():
    model, ids, cache = sparse_hf.sparsify(longrope(), SPARSE), text(1, 130), DynamicCache()
    with torch.no_grad():
        model(ids[:, :60], **named_cache(model, cache))
    given = {"attention_mask": torch.ones_like(ids), **named_cache(model, cache)}
    with pytest.raises(
        ValueError, match="computes all tokens again at this length.* and 60 of them are only in the cache"
    ):
        model.generate(ids[:, 60:], **given, **GREEDY)
