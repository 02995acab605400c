"""What goes wrong with a cache is said, and then it is as it was before, or says that it is not: every kind of cache.

The kinds: a pass that is interrupted between layers, within one, behind all of them or between tokens; other rows; no room; no row of
a learned table. Transformers' caches ask none but the first layer where a text ends, so that each is looked at by what comes next.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf.streaming_layer import StreamingLayer
from tests.models.families import VOCABULARY, dense_model, named_cache

LLAMA, SPARSE = "LlamaForCausalLM", "window(20, 0) | first(3)"
LIMIT = {"rtol": 1e-4, "atol": 1e-5}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
KINDS = ("dynamic", "static", "streaming")
ROOM = 64


def text(rows: int = 2, length: int = 60) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def made(kind: str, model, **more):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return (
        StaticCache(config=model.config, max_cache_len=ROOM)
        if kind == "static"
        else StreamingCache(model.config, **more)
    )


def sparse_model(head: str = LLAMA, pattern: str = SPARSE, **changes):
    torch.manual_seed(0)
    return sparse_hf.sparsify(dense_model(head, **changes).eval(), pattern)


class Stopped(BaseException):
    """As Ctrl-C is, of no kind that a program would catch."""


def stop(*_, **__):
    raise Stopped


@torch.no_grad()
def reads(model, ids: Tensor, cache, begin: int, end: int) -> Tensor:
    return model(ids[:, begin:end], **named_cache(model, cache)).logits


@torch.no_grad()
def goes_on(model, ids: Tensor, cache, begin: int) -> None:
    """The cache holds the tokens before `begin` and nothing else: a pass, a token and `generate` behind it are those of one pass."""
    assert int(cache.get_seq_length()) == begin
    wanted = model(ids[:, : begin + 4], use_cache=False).logits
    torch.testing.assert_close(reads(model, ids, cache, begin, begin + 3), wanted[:, begin : begin + 3], **LIMIT)
    torch.testing.assert_close(reads(model, ids, cache, begin + 3, begin + 4), wanted[:, begin + 3 :], **LIMIT)
    whole = ids[:, : begin + 7]
    right = model.generate(whole, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(whole, **named_cache(model, cache), **GREEDY), right)


@pytest.mark.parametrize(
    ("pattern", "where", "new"),
    [
        *((SPARSE, where, new) for where in ("before", "between", "behind") for new in (1, 5)),
        ("fixed(8, 2)", "between", 5),
        ("topk(6, 'indexer') | window(9, 0)", "between", 1),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_fails_is_taken_back(kind, pattern, where, new):
    if kind == "streaming" and "topk" in pattern:
        pytest.skip("keys that are chosen anew by each token are all kept")
    model, ids = sparse_model(pattern=pattern), text()
    cache = made(kind, model, **({"spare": 5} if kind == "streaming" else {}))
    reads(model, ids, cache, 0, 40)
    module = {"before": model.model.layers[0], "between": model.model.layers[1], "behind": model.lm_head}[where]
    hook = module.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        reads(model, ids, cache, 40, 40 + new)
    hook.remove()
    goes_on(model, ids, cache, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_pass_that_fails_leaves_nothing(kind):
    model, ids = sparse_model(), text()
    cache = made(kind, model)
    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        reads(model, text(2, 50).flip(1), cache, 0, 50)
    hook.remove()
    reads(model, ids, cache, 0, 30)
    goes_on(model, ids, cache, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_fails_between_keys_and_values(kind, monkeypatch):
    """Of a decoded token, wherever it stops within a layer."""
    model, ids = sparse_model(), text()
    cache = made(kind, model)
    reads(model, ids, cache, 0, 40)
    # the second of what takes a layer's keys, then its values
    name = {"dynamic": "torch.cat", "static": "torch.Tensor.index_copy_"}.get(
        kind, "sparse_hf.models.hf.streaming_layer.put"
    )
    calls, call = [], torch.cat if kind == "dynamic" else torch.Tensor.index_copy_
    if kind == "streaming":
        from sparse_hf.models.hf.streaming_layer import put as call

    def second(*args, **kwargs):
        of_cache = kind != "dynamic" or kwargs.get("dim") == -2
        calls.append(of_cache)
        if of_cache and sum(calls) == 4:
            raise Stopped
        return call(*args, **kwargs)

    monkeypatch.setattr(name, second)
    with pytest.raises(Stopped):
        reads(model, ids, cache, 40, 41)
    monkeypatch.undo()
    goes_on(model, ids, cache, 40)


@pytest.mark.parametrize("where", ["between", "within"])
def test_a_piece_that_overwrote_what_is_needed_says_so(where, monkeypatch):
    """A streaming cache has dropped what a longer piece would be taken back to, also within its first layer."""
    model, ids = sparse_model(), text()
    cache = StreamingCache(model.config)
    reads(model, ids, cache, 0, 40)
    if where == "between":
        monkeypatch.setattr(model.model.layers[1], "forward", stop)
    else:
        monkeypatch.setattr(StreamingLayer, "_written", stop)
    with pytest.raises(Stopped):
        reads(model, ids, cache, 40, 45)
    monkeypatch.undo()
    says = "a pass was interrupted between or within them, .* begin anew with cache.reset"
    with pytest.raises(ValueError, match=says):
        reads(model, ids, cache, 40, 45)
    with pytest.raises(ValueError, match=says):
        model.generate(ids, **named_cache(model, cache), **GREEDY)
    cache.reset()
    reads(model, ids, cache, 0, 40)
    goes_on(model, ids, cache, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_that_is_stopped_between_tokens_can_go_on(kind):
    model, ids = sparse_model(), text()
    cache, passes = made(kind, model), []

    def count(*_):
        passes.append(1)
        if len(passes) == 4:
            raise Stopped

    hook = model.register_forward_hook(count)
    with pytest.raises(Stopped):
        model.generate(ids[:, :40], **named_cache(model, cache), **GREEDY)
    hook.remove()
    right = model.generate(ids[:, :40], use_cache=False, **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3})
    assert int(cache.get_seq_length()) == 43
    goes_on(model, torch.cat((right, ids[:, :17]), 1), cache, 43)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_encoder_decoders(kind):
    model, ids = sparse_model("BartForConditionalGeneration"), text(2, 40)
    make = DynamicCache if kind == "dynamic" else lambda config: StaticCache(config=config, max_cache_len=ROOM)
    cache = EncoderDecoderCache(make(config=model.config), make(config=model.config))
    wanted = model.generate(ids, use_cache=False, **GREEDY)
    hook = model.model.decoder.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        # of another text, of which nothing may stay
        model.generate(ids.flip(1), **named_cache(model, cache), **GREEDY)
    hook.remove()
    if kind == "static":
        # the room of a text is that of the first one
        assert not any(cache.is_updated.values()) and not int(cache.get_seq_length())
    assert torch.equal(model.generate(ids, **named_cache(model, cache), **GREEDY), wanted)
    with torch.no_grad(), pytest.raises(ValueError, match="of 2 rows, and this batch has 3"):
        model(text(3, 40), decoder_input_ids=text(3, 1), **named_cache(model, cache))


class Own(DynamicLayer):
    """Layers that nobody knows."""


def test_layers_that_nobody_knows_and_nothing_happened_to_go_on():
    model, ids, cache = sparse_model(), text(1), DynamicCache()
    cache.layers = [Own() for _ in range(model.config.num_hidden_layers)]
    reads(model, ids, cache, 0, 40)
    for where, is_whole in ((0, True), (1, False)):
        hook = model.model.layers[where].register_forward_pre_hook(stop)
        with pytest.raises(Stopped):
            reads(model, ids, cache, 40, 41)
        hook.remove()
        if is_whole:
            wanted = model(ids[:, :41], use_cache=False).logits[:, 40:]
            torch.testing.assert_close(reads(model, ids, copy.deepcopy(cache), 40, 41), wanted, **LIMIT)
    with pytest.raises(ValueError, match="layers of its kind cannot give back"):
        reads(model, ids, cache, 40, 41)


def test_keys_that_a_pass_replaces_are_not_held():
    model, ids, cache = sparse_model(), text(1), DynamicCache()
    cache.layers = [Own() for _ in range(model.config.num_hidden_layers)]
    reads(model, ids, cache, 0, 40)
    before, alive = weakref.ref(cache.layers[0].keys), []
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: alive.append(before() is not None))
    reads(model, ids, cache, 40, 41)
    hook.remove()
    assert alive == [False]


def test_layers_that_cannot_go_back_say_so():
    """States that sum a text up, beside attention: nothing of them can be taken out again."""
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = sparse_hf.sparsify(transformers.Qwen3NextForCausalLM(config).eval(), "window(9, 0)"), text(1)
    cache = DynamicCache(config=model.config)
    reads(model, ids, cache, 0, 40)
    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        reads(model, ids, cache, 40, 41)
    hook.remove()
    with pytest.raises(ValueError, match="layers of its kind cannot give back what some of them have taken"):
        reads(model, ids, cache, 40, 41)
    # older versions do not empty one
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(reads(model, ids, cache, 0, 40), model(ids[:, :40], use_cache=False).logits, **LIMIT)


@pytest.mark.parametrize("given", ["pass", "generate", "beams"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_rows(kind, given):
    model, ids = sparse_model(), text()
    cache = made(kind, model)
    reads(model, ids, cache, 0, 40)
    rows = 4 if given == "beams" else 3
    with pytest.raises(ValueError, match=f"holds 40 tokens of 2 rows, and this batch has {rows}"):
        if given == "pass":
            reads(model, text(3), cache, 40, 41)
        else:
            beams = {"num_beams": 2} if given == "beams" else {}
            model.generate((ids if beams else text(3))[:, :50], **beams, **named_cache(model, cache), **GREEDY)
    goes_on(model, ids, cache, 40)


@pytest.mark.parametrize("by", ["pass", "generate"])
def test_a_full_static_cache(by):
    model, ids = sparse_model(), text(2, 90)
    cache = made("static", model)
    reads(model, ids, cache, 0, 40)
    with pytest.raises(ValueError, match=f"the static cache holds {ROOM} tokens"):
        if by == "pass":
            reads(model, ids, cache, 40, 70)
        else:
            model.generate(ids, **named_cache(model, cache), **GREEDY)
    goes_on(model, ids, cache, 40)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "OPTForCausalLM"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_beyond_a_learned_table(kind, head):
    model, ids = (
        sparse_model(head, **{"n_positions" if head.startswith("GPT2") else "max_position_embeddings": 62}),
        text(2, 90),
    )
    cache = made(kind, model)
    reads(model, ids, cache, 0, 40)
    beyond = r"sparse_\w+ has (positions for|a table of) \d\d: truncate, or convert the dense checkpoint with"
    with pytest.raises(ValueError, match=beyond):
        reads(model, ids, cache, 40, 63)
    with pytest.raises(ValueError, match=beyond):
        model.generate(ids[:, :63], **{**GREEDY, "max_new_tokens": 1, "min_new_tokens": 1}, **named_cache(model, cache))
    goes_on(model, ids, cache, 40)
