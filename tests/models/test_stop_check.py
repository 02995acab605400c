"""A late check of where texts end: the same tokens, logits, streams and caches, with one pass more than tokens."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, LogitsProcessor, StaticCache, StoppingCriteria
from transformers.generation import utils
from transformers.generation.streamers import BaseStreamer

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf import model_mixin, stop_check
from sparse_hf.models.hf.cache import given_cache
from sparse_hf.models.hf.stop_check import why_not_late
from sparse_hf.models.hf.streaming_cache import SPARE, SPARE_FOR_DRAFTS
from tests.crosses import slow_but_for
from tests.models.families import VOCABULARY, dense_model, named_cache
from tests.models.test_static_graph import DECODERS

LLAMA, PATTERN, NEW = "LlamaForCausalLM", "window(7, 0) | first(2)", 12
DEVICES = "sparse_hf.models.hf.late.DEVICES"


class Done:
    """An event of a device that does at once what it is told."""

    def __init__(self, *args, **kwargs):
        pass

    record = synchronize = __init__


@pytest.fixture
def late(monkeypatch):
    """Have a CPU be asked late too. Gives the checks that are made."""
    made = []

    class Watched(stop_check.LateStopCheck):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(torch, "Event", Done)
    monkeypatch.setattr(stop_check, "LateStopCheck", Watched)
    monkeypatch.setattr(DEVICES, ("cpu",))
    return made


@pytest.fixture
def model(monkeypatch):
    return as_on_a_gpu(sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN), monkeypatch)


def as_on_a_gpu(model, monkeypatch):
    """Steps behind static and streaming caches are said to be compiled, and run as they are."""

    def is_compiled(kwargs, config):
        cache = given_cache(kwargs)
        return cache is not None and cache.is_compileable

    monkeypatch.setattr(model, "_valid_auto_compile_criteria", is_compiled, raising=False)
    monkeypatch.setattr(model, "get_compiled_call", lambda config: model.__call__, raising=False)
    return model


class Heard(BaseStreamer):
    """Notes the tokens of one row, and may be interrupted."""

    def __init__(self, most: int = 1000):
        self.tokens, self.most = [], most

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())
        if len(self.tokens) >= self.most:
            raise KeyboardInterrupt

    def end(self):
        self.tokens.append("end")


def prompt(rows: int = 1, length: int = 20) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def how(**more) -> dict:
    return {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}


def plain(model, ids, monkeypatch, **more):
    """What comes of waiting for each token, of caches with as many slots."""
    with monkeypatch.context() as m:
        m.setattr(stop_check, "late_tokens", lambda device: 0)
        return model.generate(ids, **more)


def asked_late(model, ids, monkeypatch, **more):
    return model.generate(ids, **more)


def ends(model, ids: torch.Tensor, behind: int = 5) -> int:
    """A token that ends the first row's text behind some tokens, or sooner."""
    return int(model.generate(ids, **how(use_cache=False))[0, ids.shape[1] + behind])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cache", ["streaming", "static"])
def test_same_tokens_and_logits(cache, rows, model, late, monkeypatch):
    ids = prompt(rows)
    for eos in (None, ends(model, ids)):
        given = how(
            cache_implementation=cache, eos_token_id=eos, output_logits=True, output_scores=True, return_dict_in_generate=True
        )  # fmt: skip
        right = plain(model, ids, monkeypatch, **given)
        before, got = len(late), model.generate(ids, **given)
        assert torch.equal(got.sequences, right.sequences) and len(got.logits) == len(right.logits) == len(got.scores)
        assert all(map(torch.equal, got.logits, right.logits))
        # older static caches can take no token back, and are waited for where they are given back
        can = got.past_key_values.is_croppable if hasattr(got, "past_key_values") else got.cache.is_croppable
        assert len(late) - before == can and (can or cache == "static")


def test_same_samples(model, late, monkeypatch):
    ids, texts = prompt(2), []
    for run in (plain, asked_late):
        torch.manual_seed(1)
        given = how(do_sample=True, num_return_sequences=2, cache_implementation="streaming")
        texts.append(run(model, ids, monkeypatch, **given))
    assert torch.equal(*texts) and len(late) == 1


def test_one_pass_more_where_a_text_ends_of_itself(model, late, monkeypatch):
    passes, counts = [], []
    model.register_forward_pre_hook(lambda *given: passes.append(1))
    for eos in (None, ends(model, prompt())):
        for run in (plain, asked_late):
            del passes[:]
            run(model, prompt(), monkeypatch, **how(cache_implementation="streaming", eos_token_id=eos))
            counts.append(len(passes))
    assert counts[0] == counts[1] == NEW and counts[3] == counts[2] + 1 < NEW


def test_a_streamer_gets_each_token_once(model, late, monkeypatch):
    for eos in (None, ends(model, prompt())):
        heard = [Heard(), Heard()]
        given = how(cache_implementation="streaming", eos_token_id=eos)
        plain(model, prompt(), monkeypatch, **given, streamer=heard[0])
        text = model.generate(prompt(), **given, streamer=heard[1])
        assert heard[0].tokens == heard[1].tokens == [*text[0].tolist(), "end"]


@pytest.mark.parametrize("kind", ["streaming", "static"])
def test_several_turns_with_one_cache(kind, model, late):
    cache, text = made(kind, model), prompt()
    for _ in range(3):
        eos = ends(model, text)
        right = model.generate(text, **how(use_cache=False, eos_token_id=eos))
        got = model.generate(text, **how(eos_token_id=eos), **named_cache(model, cache))
        assert torch.equal(got, right) and cache.get_seq_length() == got.shape[1] - 1
        text = torch.cat((right, prompt(length=5)), 1)
    if kind == "streaming":
        # as many as ever can be taken back
        cache.crop(-1)
        got = model.generate(right[:, :-1], **how(max_new_tokens=1), **named_cache(model, cache))
        assert torch.equal(got, model.generate(right[:, :-1], **how(max_new_tokens=1, use_cache=False)))


def made(kind: str, model):
    return StreamingCache(model.config) if kind == "streaming" else StaticCache(config=model.config, max_cache_len=200)


@pytest.mark.parametrize("kind", ["streaming", "static"])
@pytest.mark.parametrize("most", [21, 22, 23, 27])
def test_an_interrupted_call_goes_on(most, kind, model, late):
    """A streamer has had fewer tokens than the cache may hold by then."""
    cache, heard = made(kind, model), Heard(most)
    right = model.generate(prompt(), **how(use_cache=False))
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt(), **how(), **named_cache(model, cache), streamer=heard)
    assert int(cache.get_seq_length()) == most - 1
    text = torch.tensor([heard.tokens])
    assert torch.equal(text, right[:, :most])
    got = model.generate(text, **how(max_new_tokens=20 + NEW - most), **named_cache(model, cache))
    assert torch.equal(got, right)


def test_which_calls_wait(late, model, monkeypatch):
    ids, given = prompt(), named_cache(model, StreamingCache(model.config))

    def why_not(model=model, kwargs=given, most=32):
        return why_not_late(model, ids, model.generation_config, most, kwargs)

    assert why_not() is None and why_not(most=None) is None
    static = named_cache(model, StaticCache(config=model.config, max_cache_len=31))
    assert why_not(kwargs=static) is None
    assert "one too many for 31" in why_not(kwargs=static, most=33)
    assert "before its 31 tokens" in why_not(kwargs=static, most=None)
    assert "each other" in why_not(kwargs={**given, "synced_gpus": True})
    learned = sparse_hf.sparsify(dense_model("GPT2LMHeadModel").eval(), PATTERN)
    config = CompileConfig()
    config._compile_all_devices = True
    learned.generation_config.compile_config = config
    cache = named_cache(learned, StreamingCache(learned.config))
    assert why_not(learned, cache, 513) is None and "one too many for 512" in why_not(learned, cache, 514)
    # the mask says that there are more tokens than ids
    longer = {**cache, "attention_mask": torch.ones(1, 30)}
    assert why_not(learned, longer, 503) is None and "one too many" in why_not(learned, longer, 504)
    monkeypatch.setattr(DEVICES, ("cuda",))
    assert why_not() == "a cpu is waited for anyway"


@pytest.mark.parametrize("devices", [("cpu",), ()])
def test_a_slot_is_kept_for_the_token_behind_the_end_where_there_may_be_one(devices, model, monkeypatch):
    monkeypatch.setattr(DEVICES, devices)
    cache = StreamingCache(model.config)
    for piece in prompt(length=40).split(1, 1):
        model(piece, **named_cache(model, cache))
    slots = 2 + 7 + SPARE + len(devices)
    assert {layer.keys.shape[2] for layer in cache.layers} == {slots}
    cache.crop(-SPARE - len(devices))
    with pytest.raises(ValueError, match="can take back 0 of"):
        cache.crop(-1)
    cache.activate_past_recording()
    assert {layer.keys.shape[2] for layer in cache.layers} == {slots - SPARE + SPARE_FOR_DRAFTS}


def test_what_users_ask_of_tokens_is_asked_of_none_behind_the_end(late, model):
    """A criterion that counts, a processor that knows no token behind the end, and a function that names the next ones."""
    asked, ids = [], prompt()

    class Count(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            asked.append(input_ids.shape[1])
            return torch.full((len(input_ids),), len(asked) >= 4)

    class Known(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert input_ids.shape[1] < 24
            return scores

    given = how(cache_implementation="streaming", stopping_criteria=[Count()], logits_processor=[Known()])
    assert model.generate(ids, **given).shape[1] == 24 and asked == [21, 22, 23, 24] and not late
    model.generate(ids, **how(cache_implementation="streaming", prefix_allowed_tokens_fn=lambda row, text: [7, 8]))
    assert not late


def test_a_version_with_another_check_waits(late, model, monkeypatch):
    right = model.generate(prompt(), **how(cache_implementation="streaming"))
    for name, value in (("Parent", object), ("ARGUMENTS", ["self"])):
        with monkeypatch.context() as m:
            m.setattr(stop_check, name, value)
            assert torch.equal(model.generate(prompt(), **how(cache_implementation="streaming")), right)
    assert len(late) == 1


def test_the_dense_model_waits_as_ever(late):
    before = utils.DeferredStopCheck
    dense_model(LLAMA).eval().generate(prompt(), **how(cache_implementation="static"))
    assert (
        not late
        and utils.DeferredStopCheck is before
        and not before.is_supported(torch.device("cuda"), None, False, False)
    )


def test_a_loop_of_another_kind_runs_as_it_is(monkeypatch):
    assert stop_check.sample_late(lambda text, more: text + more, "a", more="b") == "ab"
    # what Transformers' loop has today
    sample = utils.GenerationMixin._sample
    assert sample.__globals__[stop_check.CHECK] is utils.DeferredStopCheck
    assert model_mixin.SparseGenerationMixin._sample is not sample


@pytest.mark.gpu
@pytest.mark.compiles
# of float32, whose products are to be exact
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
# graphs of an earlier length, which torch records anew
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("cache", ["streaming", "static"])
def test_compiled_steps_of_a_gpu(cache, monkeypatch):
    """With CUDA graphs, whose replays the host is ahead of."""
    model, ids = sparse_hf.sparsify(dense_model(LLAMA).eval().cuda(), PATTERN), prompt(3).cuda()
    for more in ({}, {"eos_token_id": ends(model, ids)}, {"do_sample": True}, {"max_new_tokens": 60}):
        heard, texts = [Heard(), Heard()], []
        given = how(cache_implementation=cache, **more)
        for run, streamer in zip((plain, asked_late, asked_late), (heard[0], heard[1], None), strict=True):
            torch.manual_seed(1)
            texts.append(run(model, ids, monkeypatch, **given, streamer=streamer if len(ids) == 1 else None))
        assert all(torch.equal(text, texts[0]) for text in texts) and heard[0].tokens == heard[1].tokens
        # streamers are of one row
        ids = ids[:1]


def test_a_step_asks_less_of_the_device(model, late, monkeypatch):
    """Between two passes no mask and no positions grow; the position of the last token plus one is all that is left."""
    counts, counting = [], Counting(model)
    for run in (plain, asked_late):
        for new in (5, 6):
            counting.found = 0
            with counting:
                run(model, prompt(2), monkeypatch, **how(cache_implementation="streaming", max_new_tokens=new))
            counts.append(counting.found)
    assert counts[3] - counts[2] <= counts[1] - counts[0] - 5


class Counting(TorchDispatchMode):
    """How many operations there are outside of the passes of a model."""

    def __init__(self, model):
        super().__init__()
        self.found, self.is_inside = 0, False
        model.register_forward_pre_hook(lambda *given: setattr(self, "is_inside", True))
        model.register_forward_hook(lambda *given: setattr(self, "is_inside", False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += not self.is_inside
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", slow_but_for(("GPT2LMHeadModel", "Gemma2ForCausalLM"), DECODERS))
@pytest.mark.parametrize("cache", ["streaming", "static"])
def test_families(head, cache, late, monkeypatch):
    """None of them needs what steps are not given any more; one row is padded."""
    model, ids = sparse_hf.sparsify(dense_model(head).eval(), PATTERN), prompt(2)
    as_on_a_gpu(model, monkeypatch)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = how(cache_implementation=cache, attention_mask=mask)
    assert torch.equal(model.generate(ids, **given), plain(model, ids, monkeypatch, **given)) and len(late) == 1
