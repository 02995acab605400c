"""Families that choose keys by content, against Transformers' own classes: choices, answers, gradients, caches, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache, cache_utils

import sparse_hf
from sparse_hf.attention.chosen import IndexerScores, Limits
from sparse_hf.attention.chosen.choice import ChosenKeys
from sparse_hf.models.hf.chosen_keys import Choice
from sparse_hf.models.indexed import dsa, loss
from sparse_hf.models.indexed.dsa import DsaIndexer
from sparse_hf.testing import AllocationInterceptor
from tests.crosses import sampled
from tests.models.families import additive, named_cache
from tests.models.indexers import (
    EOS,
    LENGTH,
    TINY,
    TYPES,
    VOCABULARY,
    dense_model,
    family_and_kind,
    heads,
    inputs,
    lower_key_first,
    one_head,
)
from tests.models.test_parity import enable_checkpointing

LIMIT = 2e-5
# Transformers counts their blocks from the padding, and we from the first token of the text
FROM_THE_TEXT = {"MiniMaxM3VLTextModel", "MiniMaxM3VLForCausalLM"}
# entries are compressed from the padding on, there and here; the dense class takes no static cache
FROM_THE_PADDING = {"DeepseekV4Model", "DeepseekV4ForCausalLM"}
# no indexer of theirs scores single tokens
POOLING = {"DeepseekV4ForCausalLM", "Glm5NextTextModel", "MiniMaxM3VLForCausalLM", "Qwen4ExpForCausalLM"}
DECODERS = heads("ForCausalLM")


def real_states(outputs, batch) -> torch.Tensor:
    """The first output, of real tokens."""
    states = outputs["logits" if "logits" in outputs else "last_hidden_state"]
    return states[batch["attention_mask"].bool()] if states.ndim == 3 else states


def as_taken(head: str, batch: dict) -> dict:
    """What a head takes of a batch."""
    if head.endswith("ForSequenceClassification"):
        return {**batch, "labels": torch.tensor([0, 1])}
    if head.endswith("ForTokenClassification"):
        return {**batch, "labels": (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)}
    return batch if head.endswith("ForCausalLM") else {name: batch[name] for name in batch if name != "labels"}


def gradients(model, outputs, batch) -> dict[str, torch.Tensor | None]:
    loss = outputs["loss"] if "loss" in outputs else real_states(outputs, batch)[-20:].square().mean()
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True))


def assert_same(ours, stock, batch) -> None:
    torch.testing.assert_close(real_states(ours, batch), real_states(stock, batch), rtol=LIMIT, atol=LIMIT)
    if "loss" in stock:
        torch.testing.assert_close(ours["loss"], stock["loss"], rtol=LIMIT, atol=LIMIT)


def with_sides(names, sides=("none", "right", "left")) -> list[tuple[str, str]]:
    return [(head, side) for head in names for side in sides if side != "left" or head not in FROM_THE_TEXT]


def limited_by_patterns(names) -> list[str]:
    return [head for head in names if getattr(sparse_hf, f"Sparse{head}").config_class.takes_patterns]


@pytest.mark.cross(by=family_and_kind)
@pytest.mark.parametrize(("head", "side"), with_sides(heads()))
def test_answers_and_gradients_are_those_of_transformers(head, side):
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense)
    assert type(sparse).__name__ == f"Sparse{head}"
    batch = as_taken(head, inputs(side))
    with lower_key_first():
        stock = dense(**batch)
    ours = sparse(**batch)
    assert_same(ours, stock, batch)
    ours, stock = gradients(sparse, ours, batch), gradients(dense, stock, batch)
    for name, wanted in stock.items():
        found = ours[name]
        if wanted is None or found is None:
            # an indexer learns nothing from the loss of its model
            assert wanted is None and found is None
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=LIMIT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.cross
@pytest.mark.parametrize(
    ("head", "side"),
    [
        (head, side)
        for head in one_head()
        for side in ("right", "left")
        if side == "right" or head not in FROM_THE_PADDING
    ],
)
def test_a_padded_row_gives_what_it_gives_alone(head, side):
    sparse, batch = sparse_hf.sparsify(dense_model(head)), inputs(side, labels=False)
    real = batch["attention_mask"][0].bool()
    with torch.no_grad():
        padded, alone = sparse(**batch)[0][0][real], sparse(input_ids=batch["input_ids"][:1, real])[0][0]
    torch.testing.assert_close(padded, alone, rtol=LIMIT, atol=LIMIT)


def as_pairs(chosen) -> torch.Tensor:
    """What an indexer gives, as pairs of queries and keys (or blocks of them), none of which is in the future."""
    if isinstance(chosen, Choice):
        chosen = chosen.index
    if chosen.dtype != torch.bool:
        chosen = ChosenKeys(chosen if chosen.ndim == 4 else chosen[:, None]).as_mask(LENGTH)
    return chosen & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


@pytest.mark.parametrize("head", one_head())
def test_ties_aside_the_choice_is_that_of_transformers(head):
    dense, kept = dense_model(head), {}
    sparse = sparse_hf.sparsify(dense)
    for name, model in (("ours", sparse), ("stock", dense)):
        for module in model.modules():
            if type(module).__name__.endswith("Indexer"):
                module.register_forward_hook(lambda _, __, chosen, name=name: kept[name].append(as_pairs(chosen)))

    def found(name, model):
        kept[name] = []
        with torch.no_grad():
            model(**inputs(labels=False))
        return kept[name]

    with lower_key_first():
        ours, stock = found("ours", sparse), found("stock", dense)
    assert len(ours) == len(stock) > 0
    assert all(map(torch.equal, ours, stock))
    # where Transformers breaks ties by chance, the first layer differs in few rows
    ties = ours[0] != found("stock", dense)[0]
    assert ties.any(-1).float().mean() < 0.1


@pytest.mark.cross
@pytest.mark.parametrize(("head", "side"), with_sides(limited_by_patterns(one_head()), ("none", "left")))
def test_a_pattern_limits_the_choice(head, side):
    pattern = "window(40, 0) | first(3)"
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense, pattern)
    batch = inputs(side, labels=False)
    given = _given(sparse, pattern, batch["attention_mask"])
    with torch.no_grad(), lower_key_first():
        stock = dense(**{**batch, "attention_mask": given})
        free = dense(**batch)
        ours = sparse(**batch)
    assert_same(ours, stock, batch)
    assert not torch.allclose(real_states(ours, batch), real_states(free, batch), atol=1e-3)


def _given(sparse, pattern: str, real: torch.Tensor):
    """The pairs of a pattern as the dense class takes them: a mask for each kind of layer."""
    config = sparse.config
    windows = {kind: config.own_window(layer) for layer, kind in enumerate(config.layer_types)}
    masks = {kind: additive(_pairs(pattern, real, window)) for kind, window in windows.items()}
    return masks if len(set(map(str, windows.values()))) > 1 else next(iter(masks.values()))


def _pairs(pattern: str, real: torch.Tensor, window) -> torch.Tensor:
    causal = "causal()" if window is None else str(window)
    plan = sparse_hf.build_plan(f"({pattern}) & {causal}", LENGTH, key_padding_mask=real)
    return plan.to_dense().expand(2, -1, -1, -1)


@pytest.mark.parametrize("head", limited_by_patterns(one_head()))
def test_pairs_that_the_user_gives_are_honoured(head):
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense)
    batch = inputs(labels=False)
    batch["attention_mask"] = _given(sparse, "window(60, 0)", batch["attention_mask"])
    with torch.no_grad(), lower_key_first():
        stock, ours = dense(**batch), sparse(**batch)
    assert_same(ours, stock, inputs())


@pytest.mark.parametrize("head", one_head())
def test_packed_documents_do_not_see_each_other(head):
    sparse = sparse_hf.sparsify(dense_model(head))
    ids, cut = inputs()["input_ids"], 70
    positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])[None].expand(2, -1)
    if not sparse.config.documents_are_told_apart:
        with pytest.raises(NotImplementedError, match="have one text to a row"):
            sparse(input_ids=ids, position_ids=positions, use_cache=False)
        return
    with torch.no_grad():
        packed = sparse(input_ids=ids, position_ids=positions, use_cache=False)[0]
        alone = [sparse(input_ids=part, use_cache=False)[0] for part in (ids[:, :cut], ids[:, cut:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=LIMIT, atol=LIMIT)


@pytest.mark.cross
@pytest.mark.parametrize(
    ("head", "cache"),
    [(head, cache) for head in DECODERS for cache in (None, "static") if not cache or head not in FROM_THE_PADDING],
)
def test_generates_what_transformers_does(head, cache):
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense)
    side = "none" if head in FROM_THE_TEXT else "left"
    batch = {name: value[:, :60] for name, value in inputs(side).items() if name in ("input_ids", "attention_mask")}
    for more in ({}, {"num_beams": 2}):
        kwargs = {**batch, **more, "max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
        with lower_key_first():
            wanted = dense.generate(**kwargs)
        assert torch.equal(sparse.generate(**kwargs), wanted)


@pytest.mark.parametrize("head", DECODERS)
def test_a_text_in_pieces_is_the_text_as_a_whole(head):
    sparse = sparse_hf.sparsify(dense_model(head))
    ids = inputs()["input_ids"]
    caches = [DynamicCache(config=sparse.config)]
    if head not in FROM_THE_PADDING:
        caches += [StaticCache(config=sparse.config, max_cache_len=LENGTH + 9)]
    with torch.no_grad():
        whole = sparse(input_ids=ids, use_cache=False).logits
        for cache in caches:
            pieces = [
                sparse(input_ids=piece, **named_cache(sparse, cache)).logits for piece in ids.split([61, 1, 40, 48], 1)
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("head", one_head())
def test_saved_converted_and_loaded(head, tmp_path):
    dense = dense_model(head)
    auto = AutoModelForCausalLM if head in DECODERS else AutoModel
    sparse, batch = sparse_hf.sparsify(dense), inputs(labels=False)
    dense.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "saved")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "converted")
    with torch.no_grad():
        wanted = real_states(sparse(**batch), batch)
        for name in ("saved", "converted"):
            loaded = auto.from_pretrained(tmp_path / name).eval()
            assert type(loaded) is type(sparse)
            torch.testing.assert_close(real_states(loaded(**batch), batch), wanted, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("head", DECODERS)
def test_checkpointing_changes_no_gradient(head):
    sparse = sparse_hf.sparsify(dense_model(head)).train()
    batch = inputs()
    plain = gradients(sparse, sparse(**batch, use_cache=False), batch)
    enable_checkpointing(sparse)
    again = gradients(sparse, sparse(**batch, use_cache=False), batch)
    for name, wanted in plain.items():
        if wanted is not None:
            torch.testing.assert_close(again[name], wanted)


@pytest.mark.parametrize("head", sampled(one_head()[::3], one_head()))
def test_nothing_of_two_lengths_is_made(head):
    length = 4219 if head.startswith("DeepseekV32") else 2111
    sparse = sparse_hf.sparsify(dense_model(head, max_position_embeddings=2 * length)).train()
    ids = torch.randint(EOS + 1, VOCABULARY, (1, length))
    with AllocationInterceptor(length) as seen:
        outputs = sparse(input_ids=ids, use_cache=False)
        outputs[0].square().mean().backward()
    assert not seen.quadratic
    assert seen.calls > 100


@pytest.mark.slow
@pytest.mark.parametrize("head", one_head())
def test_nothing_of_two_lengths_is_made_of_long_texts(head):
    length = 16_411
    sparse = sparse_hf.sparsify(dense_model(head, max_position_embeddings=2 * length))
    ids = torch.randint(EOS + 1, VOCABULARY, (1, length))
    with torch.no_grad(), AllocationInterceptor(length) as seen:
        sparse(input_ids=ids, use_cache=False)
    assert not seen.quadratic
    assert seen.calls > 100


@pytest.mark.parametrize("head", one_head())
def test_weights_that_somebody_wants_to_see(head):
    dense = dense_model(head)
    dense.config._attn_implementation = "eager"
    sparse = sparse_hf.sparsify(dense)
    sparse.set_attn_implementation("sparse_reference")
    batch = inputs(labels=False)
    with torch.no_grad(), lower_key_first():
        wanted, found = (model(**batch, output_attentions=True).attentions for model in (dense, sparse))
    assert len(wanted) == len(found) > 0
    for ours, stock in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, stock, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("dense_type", TYPES)
def test_a_family_keeps_its_own_choice_without_a_pattern(dense_type):
    family = sparse_hf.FAMILIES[dense_type]
    assert family.verified and family.implies_pattern
    config = family.config_class.from_dense(AutoConfig.for_model(dense_type, **TINY[dense_type]))
    assert "window(None, None)" in config.sparse_attention["patterns"].values()


@pytest.mark.parametrize(
    ("pattern", "message"), [("marked() | window(9, 0)", "of positions"), ("lsh(4, 2)", "of positions")]
)
def test_patterns_that_are_none_of_positions_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        sparse_hf.sparsify(dense_model("DeepseekV32ForCausalLM"), pattern)


def test_layers_that_share_a_choice_share_its_pattern():
    dense = dense_model("GlmMoeDsaForCausalLM")
    with pytest.raises(ValueError, match="layer 1 has the pattern .* give both the same"):
        sparse_hf.sparsify(dense, "window(40, 0)", layers="1=window(20, 0)")
    sparse_hf.sparsify(dense, "window(40, 0)", layers="2-3=window(20, 0)")


def test_caches_that_drop_keys_and_pages_are_refused():
    sparse = sparse_hf.sparsify(dense_model("DeepseekV32ForCausalLM"), "window(40, 0)")
    with pytest.raises(ValueError, match="chooses keys by content anew.*DynamicCache"):
        sparse_hf.StreamingCache(sparse.config)
    with pytest.raises(NotImplementedError, match="choose keys by content|needs Transformers 5.24"):
        sparse.init_continuous_batching()


def test_bounds_of_documents_are_asked_for_as_positions():
    sparse = sparse_hf.sparsify(dense_model("DeepseekV32ForCausalLM"))
    bounds = torch.tensor([0, 70, LENGTH], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="pass position_ids"):
        sparse(input_ids=inputs()["input_ids"][:1], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False)


@pytest.mark.parametrize("head", sorted(POOLING - FROM_THE_TEXT))
def test_pools_are_limited_by_no_pattern(head):
    if head not in heads():
        pytest.skip("this version of Transformers has no such family")
    dense = dense_model(head)
    with pytest.raises(ValueError, match="no pattern limits that: give none"):
        sparse_hf.sparsify(dense, "window(40, 0)")


def test_padding_inside_a_row():
    dense = dense_model("DeepseekV32ForCausalLM")
    batch = inputs(labels=False)
    batch["attention_mask"][0, 50:60] = 0
    with torch.no_grad(), lower_key_first():
        assert_same(sparse_hf.sparsify(dense)(**batch), dense(**batch), batch)
    with pytest.raises(NotImplementedError, match="padding inside a row"):
        sparse_hf.sparsify(dense, "window(40, 0)")(**batch)


def test_compiled_code_is_refused():
    sparse = sparse_hf.sparsify(dense_model("DeepseekV32ForCausalLM"))
    with pytest.raises(Exception, match="run without torch.compile"):
        torch.compile(sparse, fullgraph=True, backend="eager")(**inputs(), use_cache=False)


def test_half_precision_and_dropout():
    sparse = sparse_hf.sparsify(dense_model("DeepseekV32ForCausalLM"))
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    batch = inputs("left")
    assert half(**batch).loss.isfinite()
    sparse.config.attention_dropout = 0.5
    for layer in sparse.model.layers:
        layer.self_attn.attention_dropout = 0.5
    plain = sparse(**batch).loss
    torch.manual_seed(1)
    dropped = sparse.train()(**batch).loss
    torch.manual_seed(1)
    assert dropped.isfinite() and torch.equal(dropped, sparse(**batch).loss) and not torch.allclose(dropped, plain)


def brute_loss(scores, weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """KL of the mean of the attention weights `[B, H, Q, K]` and the softmax of all scores, over the queries that see a key."""
    whole = slice(0, weights.shape[-1])
    found = scores.scores(slice(0, weights.shape[2]), whole)[:, 0].double()
    target = weights.double().mean(1)
    logs = found.masked_fill(~seen, -1e30).log_softmax(-1)
    kl = torch.where(target > 0, target * (target.clamp(min=1e-300).log() - logs), 0.0).sum(-1)
    return kl[seen.any(-1)].mean()


@pytest.mark.parametrize("offset", [0, 13])
def test_the_loss_of_an_indexer_is_that_of_all_pairs(offset, monkeypatch):
    monkeypatch.setattr(loss, "MAX_WEIGHTS", 1 << 12)
    generator, queries = torch.Generator().manual_seed(0), 70
    keys = queries + offset
    shapes = (2, queries, 4, 8), (2, keys, 8), (2, queries, 4)
    of_indexer = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    query, key = torch.randn(2, 4, queries, 12, generator=generator), torch.randn(2, 2, keys, 12, generator=generator)
    real = torch.ones(2, keys, dtype=torch.bool)
    real[0, : offset + 5] = False
    limits = Limits(q_offset=offset, allows=lambda _, k: real[:, None, None, k])
    seen = real[:, None] & torch.ones(queries, keys, dtype=torch.bool).tril(offset)
    scores = IndexerScores(*of_indexer, scale=0.3)
    products = (query @ key.repeat_interleave(2, 1).mT).masked_fill(~seen[:, None], -torch.inf) * 0.5
    wanted = brute_loss(scores, products.softmax(-1).nan_to_num(), seen)
    found = loss.indexer_loss(scores, query, key, limits, 0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(t, of_indexer) for t in (found, wanted)), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", [h for h in one_head() if h not in POOLING])
def test_indexers_learn_from_attention_to_all_keys(head):
    sparse = sparse_hf.sparsify(dense_model(head, index_topk=2 * LENGTH))
    sparse.set_attn_implementation("sparse_reference")
    batch, given, indexers = inputs("left", labels=False), [], []
    for module in sparse.modules():
        if isinstance(module, DsaIndexer):
            indexers.append(module)
            module.register_forward_pre_hook(lambda m, args, kw: given.append((m, args, kw)), with_kwargs=True)
    with sparse_hf.indexer_losses(sparse) as losses:
        outputs = sparse(**batch, output_attentions=True, use_cache=False)
    assert len(losses.each) == len(indexers) == len(given)
    seen = _pairs("causal()", batch["attention_mask"], None)[:, 0]
    assert all(one.isfinite() and one > 0 for one in losses.each)
    learned = torch.autograd.grad(losses.mean(), list(sparse.parameters()), allow_unused=True)
    for (name, _), gradient in zip(sparse.named_parameters(), learned, strict=True):
        assert (gradient is not None and gradient.any()) == (".indexer." in name), name
    # the first layer's own, from the weights that the reference shows
    with torch.no_grad():
        indexer, args, kwargs = given[0]
        kept = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dsa, "limits_of_choice", lambda *_: Limits())
            patch.setattr(dsa, "choose", lambda scores, *_: kept.append(scores) or torch.zeros(2, 1, 1, 1))
            indexer(*args, **kwargs)
    # a learned sink, which has no key, takes no part in it
    weights = outputs.attentions[0]
    wanted = brute_loss(kept[0], (weights / weights.sum(-1, keepdim=True)).nan_to_num(), seen)
    torch.testing.assert_close(losses.each[0].double(), wanted, rtol=1e-4, atol=1e-5)


def test_losses_of_indexers_fall_and_are_made_in_pieces():
    length = 1031
    sparse = sparse_hf.sparsify(
        dense_model("DeepseekV32ForCausalLM", max_position_embeddings=length, num_hidden_layers=2)
    )
    ids = torch.randint(EOS + 1, VOCABULARY, (1, length))
    found, parameters = [], [p for name, p in sparse.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(3):
        with AllocationInterceptor(length, block_sizes=()) as seen:
            with sparse_hf.indexer_losses(sparse) as losses:
                sparse(input_ids=ids, use_cache=False)
            optimizer.zero_grad()
            losses.mean().backward()
        optimizer.step()
        found.append(losses.mean().item())
        assert not seen.quadratic
    assert found == sorted(found, reverse=True)


def test_models_without_such_an_indexer_have_no_losses_of_it():
    sparse = sparse_hf.sparsify(dense_model("DeepseekV32ForCausalLM"))
    with sparse_hf.indexer_losses(sparse) as losses, pytest.raises(ValueError, match="call the model in it"):
        losses.mean()
    with (
        pytest.raises(ValueError, match="no indexer that scores single keys"),
        sparse_hf.indexer_losses(torch.nn.Linear(2, 2)),
    ):
        pass
    enable_checkpointing(sparse)
    with pytest.raises(ValueError, match="switch it off"), sparse_hf.indexer_losses(sparse):
        pass


@pytest.mark.skipif(
    "deepseek_v4" not in TYPES or not hasattr(cache_utils, "STATIC_LAYER_TYPE_MAPPING"),
    reason="this version of Transformers has no DeepSeek V4, or lists no kinds of static layers",
)
def test_a_static_cache_that_transformers_does_not_have_is_refused_in_words():
    model = sparse_hf.sparsify(dense_model("DeepseekV4ForCausalLM"))
    with pytest.raises(
        ValueError, match="no static cache for layers of kind compressed_sparse_attention.*a dynamic one"
    ):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, cache_implementation="static")
