"""Dense decoders that get an indexer by `topk(..., 'indexer')`: exactness given the choice, caches, batches, checkpoints, losses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging as transformers_logging

import sparse_hf
from sparse_hf.attention.chosen import IndexerScores
from sparse_hf.attention.composite import chosen as composite
from sparse_hf.models.hf import attention_interface as layer_attention
from sparse_hf.models.hf import indexer as room
from sparse_hf.models.hf.indexer import INDEXED, Indexer
from sparse_hf.models.indexed import loss
from sparse_hf.models.indexed.mass import kept_mass
from sparse_hf.testing import AllocationInterceptor
from tests.crosses import sampled
from tests.models.families import dense_model, named_cache
from tests.models.test_parity import enable_checkpointing
from tests.processes import printed

# GQA, biases and norms of queries, learned positions, partial rotary angles, a soft cap and its own window
FAMILIES = [
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
]  # fmt: skip
NEAR, COUNT, SIZES = "window(7, 0) | first(2)", 8, {"heads": 2, "width": 12}
PATTERN = f"{NEAR} | topk({COUNT}, 'indexer')"
LENGTH = 60


def pair(head: str = "LlamaForCausalLM", pattern: str = PATTERN, **changes):
    """The dense model and the sparse one, whose indexers share nothing with it."""
    dense = dense_model(head, **changes)
    sparse = sparse_hf.sparsify(dense, pattern, indexer=SIZES)
    for module in sparse.modules():
        if isinstance(module, Indexer):
            # scores that differ by more than rounding
            module.weights_proj.weight.data.mul_(10)
    return dense, sparse


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def scores_of(model, *args, **kwargs) -> list[IndexerScores]:
    """What the indexers of a model score in a pass, layer by layer."""
    found = []
    hooks = [
        module.register_forward_hook(lambda _, __, scores: found.append(scores))
        for module in model.modules()
        if isinstance(module, Indexer)
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return found


def brute_mask(scores: IndexerScores, window: int | None = None) -> torch.Tensor:
    """The pairs of `PATTERN` `[B, Q, Q]` by its definition, row by row; `window` is the family's own."""
    rows, length = scores.query.shape[:2]
    products = torch.einsum("bqid,bkd->bqik", scores.query.double(), scores.key.double()) * scores.scale
    values = torch.einsum("bqik,bqi->bqk", products.relu(), scores.weights.double()).float()
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for b, q in torch.cartesian_prod(torch.arange(rows), torch.arange(length)).tolist():
        seen = [k for k in range(q + 1) if window is None or q - k < window]
        near = [k for k in seen if q - k <= 7 or k < 2]
        others = sorted((k for k in seen if k not in near), key=lambda k: (-float(values[b, q, k]), k))
        mask[b, q, [*near, *others[:COUNT]]] = True
    return mask


@pytest.mark.parametrize("implementation", ["sparse", "sparse_reference"])
@pytest.mark.parametrize("head", FAMILIES)
def test_answers_are_those_of_the_dense_model_with_the_mask_of_the_choice(head, implementation):
    dense, sparse = pair(head)
    sparse.set_attn_implementation(implementation)
    text, masks = ids(), []
    config = dense.config
    own = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    # the choice of a layer goes by states that are those of the sparse model up to it
    for layer, scores in enumerate(scores_of(sparse, text)):
        slides = own is not None and (types is None or types[layer] == "sliding_attention")
        masks.append(brute_mask(scores, own if slides else None))
    modules = [module for module in dense.modules() if "Attention" in type(module).__name__]
    assert len(modules) == len(masks) > 1
    dense.config._attn_implementation = "eager"
    for module, mask in zip(modules, masks, strict=True):
        allowed = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
        _replace_mask(module, allowed)
    with torch.no_grad():
        wanted = dense(text).logits
        found = sparse(text).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _replace_mask(module, allowed: torch.Tensor) -> None:
    """Have an attention module of Transformers see these pairs."""

    def put(_, args, kwargs):
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": allowed}
        return tuple(allowed if one is None or getattr(one, "ndim", 0) == 4 else one for one in args), kwargs

    module.register_forward_pre_hook(put, with_kwargs=True)


@pytest.mark.parametrize(("width", "turned"), [(16, 16), (24, 16), (8, 8)])
def test_angles_are_those_of_the_model(width, turned):
    angles = torch.outer(torch.arange(30.0), 10000 ** -torch.linspace(0, 1, 8))
    cos, sin = (torch.cat([part(angles)] * 2, -1)[None] for part in (torch.cos, torch.sin))
    t = torch.randn(2, 30, 3, width)
    found = room.turned(t, (cos, sin))
    which = (
        torch.linspace(0, 7, turned // 2).round().long().repeat(2) + torch.arange(2).repeat_interleave(turned // 2) * 8
    )
    wanted, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(
        t[..., :turned], t[..., :turned], cos[..., which], sin[..., which], unsqueeze_dim=2
    )
    torch.testing.assert_close(found, torch.cat([wanted, t[..., turned:]], -1))
    with pytest.raises(NotImplementedError, match="form of its own"):
        room.turned(t, (torch.polar(torch.ones(30, 8), angles)[None], sin))


@pytest.mark.parametrize("head", sampled(FAMILIES[::3], FAMILIES))
def test_decoding_with_a_cache_is_reading_the_whole(head):
    _, sparse = pair(head)
    text = ids(length=40)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = sparse.generate(text, use_cache=False, **settings)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(sparse.generate(text, **settings, **more), wanted)
    beams = [sparse.generate(text, num_beams=3, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_text_in_pieces_is_the_text_as_a_whole(kind):
    _, sparse = pair()
    text = ids()
    cache = (
        DynamicCache(config=sparse.config) if kind == "dynamic" else StaticCache(sparse.config, max_cache_len=LENGTH)
    )
    with torch.no_grad():
        whole = sparse(text).logits
        pieces = [sparse(part, **named_cache(sparse, cache)).logits for part in text.split([25, 1, 20, 14], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    # a layer for each indexer, behind those of the model, whose length says nothing else
    assert len(cache.layers) == 2 * sparse.config.num_hidden_layers and cache.get_seq_length() == LENGTH


def test_a_cropped_cache_goes_on_from_there():
    _, sparse = pair()
    text, cache = ids(), DynamicCache(config=sparse.config)
    with torch.no_grad():
        sparse(text, **named_cache(sparse, cache))
        cache.crop(-20)
        again = sparse(text[:, -20:], **named_cache(sparse, cache)).logits
        torch.testing.assert_close(again, sparse(text).logits[:, -20:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_what_it_gives_alone(side):
    _, sparse = pair()
    text = ids(1)
    other, padding = ids(1, LENGTH + 9, seed=1), torch.zeros(1, 9, dtype=torch.long)
    row = torch.cat([padding, text] if side == "left" else [text, padding], 1)
    mask = torch.cat([row != 0, torch.ones_like(other, dtype=torch.bool)]).long()
    with torch.no_grad():
        both = sparse(torch.cat([row, other]), attention_mask=mask).logits
        torch.testing.assert_close(both[:1][mask[:1] == 1], sparse(text).logits[0], rtol=1e-4, atol=1e-4)
    mask[0, 20:22] = 0
    with pytest.raises(NotImplementedError, match="padding inside a row"), torch.no_grad():
        sparse(torch.cat([row, other]), attention_mask=mask)


def test_packed_documents_do_not_see_each_other():
    _, sparse = pair()
    text = ids(1)
    positions = torch.cat([torch.arange(35), torch.arange(LENGTH - 35)])[None]
    with torch.no_grad():
        packed = sparse(text, position_ids=positions, use_cache=False).logits
        apart = [sparse(part).logits for part in text.split([35, LENGTH - 35], dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    _, sparse = pair()
    sparse.save_pretrained(tmp_path)
    code = f"""
import torch, sparse_hf
from transformers import AutoModelForCausalLM
text = torch.randint(5, 97, (2, {LENGTH}), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    print(float(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})(text).logits.double().square().sum()))
"""
    with torch.no_grad():
        wanted = float(sparse(ids()).logits.double().square().sum())
    assert float(printed(code).splitlines()[-1]) == pytest.approx(wanted, rel=1e-6)


def test_parameters_are_those_that_the_documentation_names():
    dense, sparse = pair()
    new = sparse.state_dict().keys() - dense.state_dict().keys()
    parameters = "wq.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"
    layers = range(sparse.config.num_hidden_layers)
    assert new == {f"model.layers.{layer}.self_attn.indexer.{name}" for layer in layers for name in parameters}
    assert sparse.config.sparse_attention["indexer"] == SIZES


def test_another_pattern_keeps_or_drops_indexers_and_leaves_the_model_as_it_is():
    _, sparse = pair()
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    other = sparse_hf.sparsify(sparse, f"window(3, 0) | topk(4, 'indexer') | {NEAR}", layers=f"0={PATTERN}")
    assert other.config.indexer == SIZES
    assert other.model.layers[1].self_attn.indexer.wq.weight is sparse.model.layers[1].self_attn.indexer.wq.weight
    without = sparse_hf.sparsify(sparse, NEAR)
    assert not any(isinstance(module, Indexer) for module in without.modules())
    assert INDEXED not in str(without.config) and "indexer" not in without.config.sparse_attention
    larger = sparse_hf.sparsify(sparse, PATTERN, indexer={"heads": 3})
    assert larger.model.layers[0].self_attn.indexer.wq.out_features == 3 * SIZES["width"]
    with torch.no_grad():
        for model in (other, without, larger):
            assert model(ids()).logits.isfinite().all()
    after = sparse.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_new_weights_are_told(caplog):
    dense = dense_model("LlamaForCausalLM")
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    try:
        # each model is told of once
        transformers_logging.get_logger("transformers").warning_once.cache_clear()
        with caplog.at_level("WARNING"):
            sparse = sparse_hf.sparsify(dense, PATTERN, indexer=SIZES)
            assert "indexers have new weights, which choose keys at random" in caplog.text
            caplog.clear()
            # around the same weights, and with none
            sparse_hf.sparsify(sparse, "topk(3, 'indexer')")
            sparse_hf.sparsify(sparse, "window(7, 0) | first(2)")
            assert "new weights" not in caplog.text
    finally:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_propagation()


def test_some_layers_alone_have_one():
    some = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), NEAR, layers=f"1={PATTERN}", indexer=SIZES)
    assert [hasattr(layer.self_attn, "indexer") for layer in some.model.layers[:2]] == [False, True]
    text = ids(length=40)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(some.generate(text, **settings), some.generate(text, use_cache=False, **settings))


def test_the_loss_is_that_of_all_pairs_beside_what_is_near(monkeypatch):
    monkeypatch.setattr(loss, "MAX_WEIGHTS", 1 << 11)
    dense, sparse = pair()
    text = ids()
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        weights = dense(text, output_attentions=True).attentions
    found = []
    for module in sparse.modules():
        if isinstance(module, Indexer):
            module.register_forward_hook(lambda _, __, scores: found.append(scores))
    with sparse_hf.indexer_losses(sparse) as losses:
        sparse(text, decode="dense", use_cache=False)
    place = torch.arange(LENGTH)
    behind = place[:, None] - place
    others = (behind > 7) & (place >= 2)
    for one, scores, of_layer in zip(losses.each, found, weights, strict=True):
        products = torch.einsum("bqid,bkd->bqik", scores.query, scores.key) * scores.scale
        values = torch.einsum("bqik,bqi->bqk", products.relu(), scores.weights).double()
        logs = values.masked_fill(~others, -1e30).log_softmax(-1)
        target = of_layer.double().mean(1) * others
        share = target.sum(-1)
        divergence = torch.where(target > 0, target * ((target / share[..., None]).clamp(min=1e-300).log() - logs), 0.0)
        torch.testing.assert_close(one.double(), divergence.sum() / share.sum(), rtol=1e-4, atol=1e-5)
    given = torch.autograd.grad(losses.mean(), list(sparse.parameters()), allow_unused=True)
    for (name, _), gradient in zip(sparse.named_parameters(), given, strict=True):
        assert (gradient is not None and gradient.any()) == (".indexer." in name), name
    # the mean of every second query, from the first and from the second one on, makes the mean of all
    halves = []
    for first in range(2):
        monkeypatch.setattr(torch, "randint", lambda *_, first=first: torch.tensor(first))
        with sparse_hf.indexer_losses(sparse, every=2) as some:
            sparse(text, decode="dense", use_cache=False)
        halves.append(some.mean())
    assert min(halves) < losses.mean() < max(halves)


def test_a_second_derivative_of_their_loss_is_refused():
    _, sparse = pair()
    with sparse_hf.indexer_losses(sparse) as losses:
        sparse(ids(), decode="dense", use_cache=False)
    own = [p for name, p in sparse.named_parameters() if ".indexer." in name]
    with pytest.raises(RuntimeError, match="the loss of an indexer has no second derivative; call autograd without"):
        torch.autograd.grad(losses.mean(), own, create_graph=True)


def test_kept_attention_is_that_of_all_pairs():
    dense, sparse = pair()
    text = ids()
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        weights = dense(text, output_attentions=True).attentions
        scores = scores_of(sparse, text, decode="dense", use_cache=False)
        with kept_mass(sparse) as kept:
            sparse(text, decode="dense", use_cache=False)
    for found, one, of_layer in zip(kept.recalls, scores, weights, strict=True):
        assert found == pytest.approx(float((of_layer * brute_mask(one)[:, None]).sum() / of_layer.sum()), abs=1e-5)
    near = sparse_hf.sparsify(dense, NEAR)
    with torch.no_grad(), kept_mass(near) as less:
        near(text, decode="dense", use_cache=False)
    assert less.mean < kept.mean < 1
    with pytest.raises(ValueError, match="has no patterns that say"), kept_mass(dense):
        pass


def test_nothing_of_two_lengths_is_made():
    length = 1031
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM", max_position_embeddings=length), PATTERN, indexer=SIZES)
    text = ids(1, length)
    with AllocationInterceptor(length, block_sizes=()) as seen:
        with sparse_hf.indexer_losses(sparse) as losses:
            loss_of_labels = sparse(text, labels=text, use_cache=False).loss
        (loss_of_labels + losses.mean()).backward()
    assert not seen.quadratic


def test_answers_have_gradients_for_all_but_indexers():
    _, sparse = pair()
    sparse(ids(), labels=ids()).loss.backward()
    assert all((p.grad is None) == (".indexer." in name) for name, p in sparse.named_parameters())


def test_checkpointing_changes_no_gradient():
    _, sparse = pair()
    other = copy.deepcopy(sparse)
    enable_checkpointing(other)
    for model in (sparse, other):
        model.train()(ids(), labels=ids(), use_cache=False).loss.backward()
    for one, two in zip(sparse.parameters(), other.parameters(), strict=True):
        assert one.grad is None and two.grad is None or torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("BertForMaskedLM", "is no decoder, and its layers see what comes"),
        ("T5ForConditionalGeneration", "sparse_t5 adds a weight of the distance to these: give a pattern of positions"),
        ("BartForConditionalGeneration", "is no dense decoder of one stack"),
    ],
)
def test_families_that_it_does_not_fit_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        sparse_hf.sparsify(dense_model(head), PATTERN)


def test_bad_sizes_and_calls_without_an_indexer_are_refused():
    dense = dense_model("LlamaForCausalLM")
    for sizes in ({"heads": 0}, {"heds": 2}, {"width": 1.5}):
        with pytest.raises(ValueError, match="whole numbers from 1"):
            sparse_hf.sparsify(dense, PATTERN, indexer=sizes)
    with pytest.raises(ValueError, match="no pattern has topk"):
        sparse_hf.sparsify(dense, NEAR, indexer=SIZES)
    q = k = v = torch.randn(1, 2, LENGTH, 8)
    with pytest.raises(NotImplementedError, match="none were handed over"):
        sparse_hf.sparse_attention(q, k, v, PATTERN)
    with pytest.raises(ValueError, match="scores is 'learned'; the known ones are 'dot', 'indexer'"):
        sparse_hf.Pattern.parse("topk(3, 'learned')")


def test_caches_and_code_that_it_cannot_go_with_are_refused():
    _, sparse = pair()
    with pytest.raises(ValueError, match="use a DynamicCache"):
        sparse.generate(ids(), cache_implementation="streaming", max_new_tokens=2)
    cache = DynamicCache(config=sparse.config, offloading=True) if torch.cuda.is_available() else DynamicCache()
    cache.offloading = True
    with pytest.raises(NotImplementedError, match="no place for the keys of an indexer"), torch.no_grad():
        sparse(ids(), **named_cache(sparse, cache))
    with pytest.raises(Exception, match=r"run without torch\.compile"):
        torch.compile(sparse, backend="eager", fullgraph=True)(ids())
    torch._dynamo.reset()


def test_a_folder_without_their_weights_gets_new_ones(tmp_path):
    dense, _ = pair()
    dense.save_pretrained(tmp_path)
    config = type(sparse_hf.sparsify(dense, NEAR).config).from_dense(dense.config, PATTERN, indexer=SIZES)
    loaded = sparse_hf.SparseLlamaForCausalLM.from_pretrained(tmp_path, config=config)
    weights = [module.wq.weight for module in loaded.modules() if isinstance(module, Indexer)]
    assert len(weights) == dense.config.num_hidden_layers and all(0 < w.std().item() < 1 for w in weights)
    assert isinstance(AutoModelForCausalLM.from_config(config).model.layers[0].self_attn.indexer, Indexer)


SHARED = {**SIZES, "share": 2}


def shared_pair(head: str = "LlamaForCausalLM", layers: int = 5):
    name = "n_layer" if head.startswith("GPT2") else "num_hidden_layers"
    sparse = sparse_hf.sparsify(dense_model(head, **{name: layers}), PATTERN, indexer=SHARED)
    for module in sparse.modules():
        if isinstance(module, Indexer):
            module.weights_proj.weight.data.mul_(10)
    return sparse


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_layers_that_share_an_indexer_choose_by_the_scores_of_the_first(head, monkeypatch):
    sparse, text = shared_pair(head), ids()
    indexers = [module for module in sparse.modules() if isinstance(module, Indexer)]
    assert len(indexers) == 3 and len([m for m in sparse.modules() if isinstance(m, room.SharedIndexer)]) == 2
    calls, counted, choose = [], [], composite.choose
    attend = layer_attention.AttentionCall
    monkeypatch.setattr(layer_attention, "AttentionCall", lambda *a, **k: calls.append(attend(*a, **k)) or calls[-1])
    monkeypatch.setattr(composite, "choose", lambda *a: counted.append(a) or choose(*a))
    made = scores_of(sparse, text)
    # five layers choose by three indexers, which choose once each
    assert [call.indexed for call in calls] == [made[0], made[0], made[1], made[1], made[2]] and len(counted) == 3
    masks = [call.chosen_plan.chosen_mask(call, torch.arange(LENGTH)) for call in calls]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("make", [lambda config: DynamicCache(config=config), lambda config: StaticCache(config, 60)])
def test_shared_indexers_decode_as_they_read(make):
    sparse, text = shared_pair(), ids(length=40)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = sparse.generate(text, use_cache=False, **settings)
    cache = make(sparse.config)
    assert torch.equal(sparse.generate(text, disable_compile=True, **named_cache(sparse, cache), **settings), wanted)
    # keys of three indexers behind those of five layers
    assert len(cache.layers) == 8


def test_scores_of_layers_that_are_done_are_not_kept():
    sparse, kept = shared_pair(), []
    attention = sparse.model.layers[-1].self_attn
    hook = attention.register_forward_hook(
        lambda _, __, given, ___: kept.append(list(given["attention_mask"].handed_on)), with_kwargs=True
    )
    with torch.no_grad():
        sparse(ids())
    hook.remove()
    assert kept == [[4]]


def test_shared_indexers_are_saved_loaded_and_learn_from_all_their_layers(tmp_path):
    sparse, text = shared_pair(), ids()
    sparse.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.indexer == SHARED and torch.equal(again(text).logits, sparse(text).logits)
    with sparse_hf.indexer_losses(sparse) as losses:
        sparse(text, decode="dense", use_cache=False)
    assert len(losses.each) == 5
    parameters = [sparse.model.layers[0].self_attn.indexer.wq.weight]
    both = [torch.autograd.grad(one, parameters, retain_graph=True)[0] for one in losses.each[:2]]
    (found,) = torch.autograd.grad(losses.each[0] + losses.each[1], parameters, retain_graph=True)
    assert all(one.any() for one in both)
    torch.testing.assert_close(found, both[0] + both[1])
    assert torch.autograd.grad(losses.each[2], parameters, allow_unused=True) == (None,)


def test_checkpointing_changes_nothing_where_indexers_are_shared():
    sparse = shared_pair().train()
    text = ids()
    wanted = torch.autograd.grad(sparse(text, labels=text).loss, sparse.model.embed_tokens.weight)
    enable_checkpointing(sparse)
    found = torch.autograd.grad(sparse(text, labels=text, use_cache=False).loss, sparse.model.embed_tokens.weight)
    torch.testing.assert_close(found, wanted)


def test_how_many_share_may_change_and_has_limits():
    alone = pair()[1]
    weight = alone.model.layers[0].self_attn.indexer.wq.weight
    shared = sparse_hf.sparsify(alone, PATTERN, indexer={"share": 2})
    assert torch.equal(shared.model.layers[0].self_attn.indexer.wq.weight, weight)
    assert not list(shared.model.layers[1].self_attn.indexer.parameters())
    with pytest.raises(ValueError, match="share, whole numbers from 1"):
        sparse_hf.sparsify(dense_model("LlamaForCausalLM"), PATTERN, indexer={"share": 0})
    with pytest.raises(ValueError, match="are of several kinds: .*'share': 1"):
        sparse_hf.sparsify(dense_model("Gemma2ForCausalLM"), PATTERN, indexer=SHARED)
    follower = shared.model.layers[1].self_attn.indexer
    with pytest.raises(NotImplementedError, match="made no scores for it in this pass"):
        follower(torch.zeros(1, 4, 8), None)
