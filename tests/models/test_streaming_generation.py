"""What `generate` does with a streaming cache: asked for by name, saved, drafts taken back, prompts in pieces, conversations."""

from __future__ import annotations

import copy
import inspect
import json
import logging

import pytest
import torch
import transformers
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, StaticCache

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.conversion import describe_conversion, report_text
from sparse_hf.conversion.export import export
from sparse_hf.models.hf.cache import logger as cache_logger
from sparse_hf.testing import AllocationInterceptor
from tests.models.families import EOS, VOCABULARY, dense_model, explicit_mask, named_cache

LLAMA, SPARSE = "LlamaForCausalLM", "window(20, 0) | first(3)"
GREEDY = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0}
STREAMING = {"cache_implementation": "streaming"}


def text(rows: int = 2, length: int = 40, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def sparse_model(head: str = LLAMA, pattern: str = SPARSE, **more):
    return sparse_hf.sparsify(dense_model(head), pattern, **more)


def cache_of(output):
    return output.get("cache", output.get("past_key_values"))


def decoded_with(model, ids: Tensor, **given):
    """The text, and the class of the cache that `generate` took."""
    output = model.generate(ids, return_dict_in_generate=True, **GREEDY, **given)
    return output.sequences, type(cache_of(output))


@pytest.fixture
def folder(tmp_path):
    dense_model(LLAMA).save_pretrained(tmp_path / "dense")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", SPARSE, progress=False)
    return tmp_path


def said(folder) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def test_by_name():
    model, ids = sparse_model(), text()
    wanted = model.generate(ids, use_cache=False, **GREEDY)
    # assistants and servers hand over a configuration of their own
    for given in (STREAMING, {"generation_config": GenerationConfig(**STREAMING, **GREEDY)}):
        output = model.generate(
            ids, return_dict_in_generate=True, **({} if "generation_config" in given else GREEDY), **given
        )
        assert torch.equal(output.sequences, wanted) and isinstance(cache_of(output), StreamingCache)


def test_a_converted_folder_streams_by_default(folder):
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(folder / "sparse"), text()
    wanted = model.generate(ids, use_cache=False, **GREEDY)
    assert said(folder / "sparse")["eos_token_id"] == 2
    found, kind = decoded_with(model, ids)
    assert torch.equal(found, wanted) and kind is StreamingCache
    # what this call says goes before what the folder says of all
    for given in (named_cache(model, DynamicCache()), {"cache_implementation": "dynamic"}):
        found, kind = decoded_with(model, ids, **given)
        assert torch.equal(found, wanted) and kind is DynamicCache
    model.save_pretrained(folder / "again")
    assert said(folder / "again")["cache_implementation"] == "streaming"
    words = WordTokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    caches = []
    model.register_forward_pre_hook(lambda _, args, given: caches.append(cache_of(given)), with_kwargs=True)
    transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("w5 w6 w7", max_new_tokens=3)
    assert all(isinstance(cache, StreamingCache) for cache in caches)


def test_what_convert_writes(folder, tmp_path):
    source = folder / "dense"
    assert said(folder / "sparse")["cache_implementation"] == "streaming"
    assert "cache_implementation='streaming'" in (folder / "sparse" / "conversion.txt").read_text()
    sparse_hf.convert(source, tmp_path / "static", SPARSE, cache="static", progress=False)
    assert said(tmp_path / "static")["cache_implementation"] == "static"
    (source / "generation_config.json").unlink()
    sparse_hf.convert(source, tmp_path / "anew", SPARSE, progress=False)
    assert {"cache_implementation": "streaming", "eos_token_id": 2}.items() <= said(tmp_path / "anew").items()
    sparse_hf.convert(source, tmp_path / "endless", "stride(4) | window(3, 0)", progress=False)
    assert not (tmp_path / "endless" / "generation_config.json").is_file()
    report = report_text(describe_conversion(source, "stride(4) | window(3, 0)"))
    assert (
        "Cache: generate keeps all keys; layer 0 has the pattern (stride(4) | window(3, 0)) & window(None, 0)" in report
    )
    with pytest.raises(ValueError, match="layer 0 has the pattern .* looks back without end"):
        describe_conversion(source, "stride(4) | window(3, 0)", cache="streaming")
    with pytest.raises(ValueError, match="cache is 'endless'; it must be one of static, .*streaming"):
        describe_conversion(source, SPARSE, cache="endless")


def test_what_has_no_streaming_cache_names_none(folder, tmp_path):
    export(folder / "sparse", tmp_path / "back", "dense", progress=False)
    assert said(tmp_path / "back")["cache_implementation"] is None
    dense_model("BertModel").save_pretrained(tmp_path / "bert")
    report = describe_conversion(tmp_path / "bert", "window(5, 5)")
    assert report["cache"] is None and "Cache" not in report_text(report)
    with pytest.raises(ValueError, match="cache is 'streaming', and BertModel does not generate; leave it out"):
        describe_conversion(tmp_path / "bert", "window(5, 5)", cache="streaming")


@pytest.mark.parametrize("pattern", ["stride(4) | window(3, 0)", "window(3, 0) | random_blocks(2, 8)"])
def test_a_pattern_without_end_is_named(pattern):
    with pytest.raises(ValueError, match=r"layer 1 has the pattern .*: .*; use a DynamicCache"):
        sparse_model(layers={1: pattern}).generate(text(), **STREAMING, **GREEDY)


def test_padding_behind_a_prompt_keeps_all_keys_and_says_so(caplog):
    logging.getLogger("sparse_hf").propagate = True
    cache_logger.warning_once.cache_clear()
    model, ids = sparse_model(), text()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    found, kind = decoded_with(model, ids, attention_mask=mask, **STREAMING)
    assert torch.equal(found, wanted) and kind is DynamicCache
    assert caplog.text.count("a streaming cache cannot tell from others") == 1


@pytest.mark.parametrize("pattern", [SPARSE, "window(6, 0) | first(1)", "chunk(8)"])
def test_a_sparse_twin_drafts_for_the_dense_model(pattern):
    dense, ids = dense_model(LLAMA), text(1, 60)
    twin, wanted = sparse_hf.sparsify(dense, pattern), dense.generate(ids, **GREEDY)
    assert twin.lm_head.weight.data_ptr() == dense.lm_head.weight.data_ptr()
    caches = []
    twin.register_forward_pre_hook(lambda _, args, given: caches.append(cache_of(given)), with_kwargs=True)
    assert torch.equal(dense.generate(ids, assistant_model=twin, **GREEDY), wanted)
    assert caches and all(isinstance(cache, StreamingCache) for cache in caches)
    # drafts were taken back
    assert caches[-1].layers[0].oldest == 0 or len(caches) > 30 // 20


SAMPLES, DRAWN, LEAST_P = 800, 3, 1e-4


def unlikely(counts: Tensor, chances: Tensor) -> float:
    """The p-value of Pearson's chi-squared test of counts, outcomes of which fewer than 5 are expected taken together."""
    expected = chances * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    statistic = ((counts - expected).square() / expected.clamp(min=1e-9)).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic.double() / 2))


@pytest.fixture(scope="module")
def sampled():
    """A dense model of few words that is unlike its twin, and the chances of each text of three new tokens, `[V, V, V]`."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 4,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)
    ).eval()
    for weight in dense.parameters():
        weight.data.normal_(0, 0.9)
    prompt = torch.tensor([[0, 1, 2, 3, 3, 2, 0, 1]])
    words = torch.cartesian_prod(*[torch.arange(4)] * DRAWN)
    with torch.no_grad():
        logits = dense(torch.cat((prompt.expand(len(words), -1), words), 1), use_cache=False).logits
    places = logits[:, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
    return dense, prompt, places.gather(-1, words[..., None]).sum((1, 2)).exp()


def counted(model, prompt: Tensor, at_once: int = 1, **given) -> Tensor:
    """How often each text of three new tokens is drawn."""
    found, bases = torch.zeros(4**DRAWN), 4 ** torch.arange(DRAWN - 1, -1, -1)
    torch.manual_seed(0)
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": DRAWN, "pad_token_id": 0, **given}
    for _ in range(SAMPLES // at_once):
        ids = prompt.expand(at_once, -1)
        drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        found += ((drawn[:, -DRAWN:] * bases).sum(1)).bincount(minlength=len(found))
    return found


@pytest.mark.slow
def test_sampled_drafts_have_the_dense_models_chances(sampled):
    """Texts are drawn with a fixed seed; of the twin alone the same test says that they are others."""
    dense, prompt, chances = sampled
    twin = sparse_hf.sparsify(dense, "window(1, 0)")
    twin.generation_config.assistant_confidence_threshold = 0.0
    twin.generation_config.num_assistant_tokens = 2
    assert float(chances.sum()) == pytest.approx(1)
    assert unlikely(counted(dense, prompt, assistant_model=twin), chances) > LEAST_P
    assert (
        unlikely(counted(twin, prompt, at_once=SAMPLES), chances)
        < LEAST_P
        < unlikely(counted(dense, prompt, at_once=SAMPLES), chances)
    )


def test_a_twin_whose_pattern_has_no_end_drafts_too():
    dense, ids = dense_model(LLAMA), text(1, 60)
    twin = sparse_hf.sparsify(dense, "stride(4) | window(3, 0)")
    assert torch.equal(dense.generate(ids, assistant_model=twin, **GREEDY), dense.generate(ids, **GREEDY))


@pytest.mark.parametrize("way", ["lookup", "assistant"])
@pytest.mark.parametrize("pattern", [SPARSE, "chunk(8)"])
def test_drafts_for_a_sparse_model_are_taken_back(pattern, way):
    dense = dense_model(LLAMA)
    model, ids = sparse_hf.sparsify(dense, pattern), text(1, 20).repeat(1, 3)
    how = {"prompt_lookup_num_tokens": 5} if way == "lookup" else {"assistant_model": dense}
    wanted = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **STREAMING, **how, **GREEDY), wanted)
    cache = StreamingCache(model.config)
    assert torch.equal(model.generate(ids, **named_cache(model, cache), **how, **GREEDY), wanted)


@pytest.mark.parametrize("piece", [1, 7, 33])
def test_prompts_in_pieces(piece):
    model, ids = sparse_model(), text(3, 60)
    mask = torch.ones_like(ids)
    # a row whose first pieces are padding, and one that begins within a piece
    ids[0, :40], mask[0, :40], mask[1, :5] = 0, 0, 0
    wanted = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    found = model.generate(ids, attention_mask=mask, prefill_chunk_size=piece, **STREAMING, **GREEDY)
    assert torch.equal(found, wanted)


@pytest.mark.cross(("kind", "is_whole"), "piece")
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole text", "new tokens"])
@pytest.mark.parametrize("kind", [StreamingCache, DynamicCache, StaticCache])
@pytest.mark.parametrize("piece", [1, 7, 200])
def test_prompts_in_pieces_behind_a_cache(piece, kind, is_whole):
    """Each token is read once, whichever version of Transformers cuts the prompt."""
    model, ids, more = sparse_model(), text(2, 30), text(2, 25, seed=5)
    mask = torch.ones_like(ids)
    ids[0, :8], mask[0, :8] = 0, 0
    cache = StaticCache(config=model.config, max_cache_len=200) if kind is StaticCache else kind(config=model.config)
    answer = model.generate(ids, attention_mask=mask, **named_cache(model, cache), **GREEDY)
    whole = torch.cat((answer, more), 1)
    mask = torch.cat((mask, torch.ones(2, whole.shape[1] - 30, dtype=mask.dtype)), 1)
    wanted = model.generate(whole, attention_mask=mask, use_cache=False, **GREEDY)
    given = whole if is_whole else whole[:, cache.get_seq_length() :]
    found = model.generate(given, attention_mask=mask, prefill_chunk_size=piece, **named_cache(model, cache), **GREEDY)
    assert torch.equal(found[:, -30:], wanted[:, -30:])
    assert int(cache.get_seq_length()) == wanted.shape[1] - 1


def test_drafts_for_a_prompt_in_pieces():
    dense, ids = dense_model(LLAMA), text(1, 60)
    twin, wanted = sparse_hf.sparsify(dense, SPARSE), dense.generate(ids, **GREEDY)
    assert torch.equal(dense.generate(ids, assistant_model=twin, prefill_chunk_size=16, **GREEDY), wanted)


def test_prompts_in_pieces_take_the_memory_of_a_piece():
    model, taken = sparse_model(), []
    for length in (500, 2000):
        ids = text(1, length)
        with torch.no_grad(), AllocationInterceptor(length=10**9) as seen:
            cache = StreamingCache(model.config)
            for begin in range(0, length, 50):
                model(ids[:, begin : begin + 50], **named_cache(model, cache))
        taken.append(seen.largest)
    assert taken[0] == taken[1]


def test_an_answer_is_edited():
    """A turn, an answer of which half is taken back, and another end in its place."""
    model, ids = sparse_model(), text(1, 60)
    cache = StreamingCache(model.config, spare=40)
    answer = model.generate(ids, **named_cache(model, cache), **GREEDY)
    kept = answer[:, :-15]
    # the last token of an answer was never read
    cache.crop(-14)
    edited = torch.cat((kept, text(1, 9, seed=9)), 1)
    wanted = model.generate(edited, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(edited, **named_cache(model, cache), **GREEDY), wanted)


def test_a_shared_prefix_is_forked():
    model, prefix = sparse_model(), text(2, 60)
    cache = StreamingCache(model.config)
    with torch.no_grad():
        model(prefix, **named_cache(model, cache))
    for seed in range(3):
        whole = torch.cat((prefix, text(2, 7, seed)), 1)
        fork = copy.deepcopy(cache)
        wanted = model.generate(whole, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(whole, **named_cache(model, fork), **GREEDY), wanted)
    assert cache.get_seq_length() == 60


class InterruptedPassError(Exception):
    pass


def test_an_interrupted_pass_is_noticed():
    """Some layers have taken the tokens of a pass, and others have not."""
    model, ids = sparse_model(), text(1, 60)
    cache = StreamingCache(model.config)
    with torch.no_grad():
        model(ids[:, :40], **named_cache(model, cache))

        def fails(*_):
            raise InterruptedPassError

        hook = model.model.layers[1].register_forward_pre_hook(fails)
        with pytest.raises(InterruptedPassError):
            model(ids[:, 40:45], **named_cache(model, cache))
        hook.remove()
        with pytest.raises(
            ValueError, match=r"layers have seen different numbers of tokens \(45, 40\): a pass was .*reset"
        ):
            model(ids[:, 45:], **named_cache(model, cache))
        cache.reset()
        found = model(ids, **named_cache(model, cache)).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits)


def sparse_then_dense(dense, prompt: Tensor, pattern: str) -> Tensor:
    """The dense model's greedy text, whose prompt is read by a pattern, and what follows sees everything."""
    ids, length = prompt, prompt.shape[1]
    for _ in range(GREEDY["max_new_tokens"]):
        mask = explicit_mask(pattern, ids.shape[1], torch.ones_like(ids), None, is_causal=True)[:1]
        mask[:, :, length:] = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[length:]
        with torch.no_grad():
            logits = dense(ids, attention_mask=mask.expand(len(ids), -1, -1, -1)).logits
        # the end of a text is not wanted yet
        logits[..., EOS] = -torch.inf
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("where", ["call", "configuration"])
def test_a_sparse_prompt_is_decoded_densely(where, kind):
    dense, ids = dense_model(LLAMA), text()
    wanted = sparse_then_dense(dense, ids, SPARSE)
    model = sparse_hf.sparsify(dense, SPARSE, decode="dense" if where == "configuration" else None)
    asked = {"decode": "dense"} if where == "call" else {}
    given = {"cache_implementation": kind}
    assert torch.equal(model.generate(ids, **given, **asked, **GREEDY), wanted)
    assert not torch.equal(model.generate(ids, **given, **asked | {"decode": "sparse"}, **GREEDY), wanted)


class Waits(TorchDispatchMode):
    """Counts how often a number is read off a tensor, for which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["static", "streaming"])
def test_preparing_a_step_waits_for_nothing(kind, monkeypatch):
    """Between compiled steps `generate` prepares the next one, on the host."""
    decode = {"decode": "dense"} if kind == "static" else {}
    model, waits = sparse_model(), []
    prepare = type(model).prepare_inputs_for_generation

    def counted(self, *args, **kwargs):
        with Waits() as mode:
            inputs = prepare(self, *args, **kwargs)
        waits.append(mode.count)
        return inputs

    counted.__signature__ = inspect.signature(prepare)
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", counted)
    model.generate(text(), cache_implementation=kind, **decode, **GREEDY)
    assert len(waits) == GREEDY["max_new_tokens"] and not any(waits[1:])


def test_convert_writes_dense_decoding(folder, tmp_path):
    sparse_hf.convert(folder / "dense", tmp_path / "densely", SPARSE, decode="dense", progress=False)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "densely").decode == "dense"
    report = (tmp_path / "densely" / "conversion.txt").read_text()
    assert "Decoding: dense, behind a prompt" in report and "generate keeps all keys" in report
    dense_model("BartForConditionalGeneration").save_pretrained(tmp_path / "bart")
    with pytest.raises(ValueError, match="decode is 'dense', and sparse_bart is no decoder with a dense counterpart"):
        describe_conversion(tmp_path / "bart", "window(5, 0)", decode="dense")


def test_an_exhausted_static_cache_says_so():
    model, ids = sparse_model(), text(1, 60)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids, **named_cache(model, cache))
        with pytest.raises(ValueError, match="static cache holds 64 tokens, and with this pass there would be 65"):
            model(text(1, 5), **named_cache(model, cache))
        # it goes on as if nothing had happened
        found = model(text(1, 64)[:, 60:], **named_cache(model, cache)).logits
    wanted = model(torch.cat((ids, text(1, 64)[:, 60:]), 1), use_cache=False).logits
    torch.testing.assert_close(found, wanted[:, 60:])
    with pytest.raises(ValueError, match="static cache holds 64 tokens, and this call may come to 89"):
        model.generate(ids, **named_cache(model, StaticCache(config=model.config, max_cache_len=64)), **GREEDY)


def test_dense_decoding_is_saved_and_wants_all_keys(tmp_path):
    model = sparse_hf.sparsify(dense_model(LLAMA), SPARSE, decode="dense")
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).decode == "dense"
    with pytest.raises(ValueError, match="decode='dense', for which all keys are needed; use a DynamicCache"):
        StreamingCache(model.config)
    with pytest.raises(ValueError, match="all keys are needed"):
        model.generate(text(), **STREAMING, **GREEDY)
    with pytest.raises(ValueError, match="decode is 'often'; it must be 'sparse' or 'dense'"):
        model.generate(text(), decode="often", **GREEDY)
    with pytest.raises(ValueError, match="pattern of layer 0 is window"):
        sparse = sparse_model()
        sparse.generate(text(), **named_cache(sparse, StreamingCache(sparse.config)), decode="dense", **GREEDY)


@pytest.mark.parametrize("kind", [StreamingCache, DynamicCache])
def test_a_padded_prompt_read_by_hand(kind):
    model, ids = sparse_model(), text(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    cache = StreamingCache(model.config) if kind is StreamingCache else kind()
    positions = (mask[:, :40].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids[:, :40], attention_mask=mask[:, :40], position_ids=positions, **named_cache(model, cache))
    found = model.generate(ids, attention_mask=mask, **named_cache(model, cache), **GREEDY)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
