"""Configurations by hand: patterns as arguments, layers that come and go, fields that no longer matter."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import sparse_hf
from sparse_hf.models.hf.layers import layer_numbers
from tests.crosses import sampled
from tests.models.families import HEADS, TINY, dense_config, dense_model, inputs, one_head, sparse_class

ENCODER = "window(9, 4) | first(2) | marked()"
DECODER = "window(12, 0) | first(1)"


@pytest.fixture
def warnings(caplog):
    """What is logged from here on, messages that are given once included."""
    logging.Logger.warning_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="sparse_hf")
    return caplog


def has_two_stacks(family: str) -> bool:
    return "encoder" in sparse_hf.FAMILIES[family].config_class(**TINY[family]).stacks


def arguments(family: str) -> dict:
    layers = (
        {"decoder": DECODER}
        if has_two_stacks(family)
        else None
        if family == "albert"
        else {1: "window(3, 3) | marked()"}
    )
    return {"pattern": ENCODER, "layers": layers, "global_token_ids": [5, 7]}


@pytest.mark.parametrize("family", TINY)
def test_arguments_say_what_from_dense_says(family, tmp_path):
    config_class = sparse_hf.FAMILIES[family].config_class
    config = config_class(**TINY[family], **arguments(family))
    dense = config_class.__bases__[1](**TINY[family])
    assert config.sparse_attention == config_class.from_dense(dense, **arguments(family)).sparse_attention
    assert config.global_token_ids == [5, 7] and config.uses_marks
    config.save_pretrained(tmp_path)
    assert not {"pattern", "layers", "global_token_ids"} & set(json.loads((tmp_path / "config.json").read_text()))
    assert AutoConfig.from_pretrained(tmp_path).sparse_attention == config.sparse_attention


@pytest.mark.parametrize("family", ["longformer", "led", "reformer", "perceiver"])
def test_families_that_are_sparse_by_themselves_take_a_pattern_and_need_none(family):
    config_class = sparse_hf.FAMILIES[family].config_class
    pattern = "ring(64, 1, 0)" if family == "reformer" else "window(7, 7)"
    layers = {"layers": {"decoder": DECODER}} if family == "led" else {}
    assert config_class().sparse_attention is None
    made = config_class(pattern=pattern, **layers).sparse_attention
    assert made == config_class.from_dense(config_class.__bases__[1](), pattern, **layers).sparse_attention
    assert pattern in made["patterns"].values()


@pytest.mark.parametrize("head", ["BertModel", "LlamaModel"])
def test_a_pattern_among_the_arguments_makes_the_model_sparse(head):
    dense, batch = dense_model(head), inputs(head)
    config = sparse_class(head).config_class(**dense_config(head).to_dict(), pattern="window(9, 0)")
    model = sparse_class(head)(config).eval()
    model.load_state_dict(dense.state_dict())
    with torch.no_grad():
        found, wanted, other = (m(**batch)[0] for m in (model, sparse_hf.sparsify(dense, "window(9, 0)"), dense))
    torch.testing.assert_close(found, wanted)
    assert (found - other).abs().max() > 1e-3


def test_arguments_replace_the_pattern_of_a_saved_folder(tmp_path):
    sparse_hf.sparsify(dense_model("BertModel"), "window(9, 9) | marked()", global_token_ids=[4]).save_pretrained(
        tmp_path
    )
    for load in (sparse_hf.SparseBertConfig.from_pretrained, AutoConfig.from_pretrained):
        config = load(tmp_path, pattern="window(2, 2)", layers={0: "dense"})
        assert config.sparse_attention["patterns"] == {"dense": "window(None, None)", "sparse": "window(2, 2)"}
        assert config.sparse_attention["layers"] == ["dense", "sparse"] and not config.global_token_ids
    model = AutoModel.from_pretrained(tmp_path, pattern="window(2, 2) | marked()", global_token_ids=[6])
    assert model.config.layer_pattern(1) == "window(2, 2) | marked()" and model.config.global_token_ids == [6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "window(3, 3)", "sparse_attention": {"patterns": {}, "layers": []}}, "sparse_attention and pattern are given"),
        ({"layers": "0=dense"}, "sparse_bert implies no pattern; give one"),
        ({"global_token_ids": [3]}, "sparse_bert implies no pattern; give one"),
        ({"pattern": "window(3, 3)", "global_token_ids": [3]}, "no pattern has marked"),
        ({"pattern": "windows(3, 3)"}, "windows"),
        ({"pattern": "window(3, 3)", "layers": "0-9=dense"}, "is outside the model, which has layers 0-1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        sparse_hf.SparseBertConfig(**TINY["bert"], **given)


def test_a_model_without_a_pattern_says_so_once(warnings, tmp_path):
    config = sparse_hf.SparseBertConfig(**TINY["bert"])
    assert not warnings.messages
    for _ in range(2):
        sparse_hf.SparseBertForMaskedLM(config)
    assert len(warnings.messages) == 1
    assert "this sparse_bert model has no pattern" in warnings.messages[0]
    assert "SparseBertConfig(pattern=" in warnings.messages[0]
    # a dense folder, whose configuration says nothing of patterns
    dense_model("LlamaModel").save_pretrained(tmp_path)
    sparse_hf.SparseLlamaModel.from_pretrained(tmp_path)
    assert sum("this sparse_llama model has no pattern" in message for message in warnings.messages) == 1


def test_a_model_with_a_pattern_says_nothing(warnings, tmp_path):
    sparse_hf.sparsify(dense_model("BertModel"), "window(9, 9) | first(1)").save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)
    sparse_hf.SparseBertModel(sparse_hf.SparseBertConfig(**TINY["bert"], pattern="window(None, None)"))
    longformer = sparse_hf.SparseLongformerConfig(num_hidden_layers=1, hidden_size=12, attention_window=[8])
    sparse_hf.SparseLongformerModel(longformer)
    assert not warnings.messages


def stacks_of(model) -> list[tuple[nn.Module, str]]:
    """Where a model holds its layers, encoder first."""
    of_name = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    names = [name for name, layers in of_name.items() if len(layers) == 4 and not any(n in name for n in ("experts",))]
    return [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]


def chosen(model, order: list[int], renumber: bool):
    """The model with these of its layers, as its users would do it."""
    for owner, name in stacks_of(model):
        layers = [copy.deepcopy(getattr(owner, name)[i]) for i in order]
        setattr(owner, name, nn.ModuleList(layers))
        for number, layer in enumerate(layers if renumber else ()):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = number
    for field in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        if hasattr(model.config, field):
            setattr(model.config, field, len(order))
    for field in ("layer_types", "no_rope_layers"):
        if getattr(model.config, field, None):
            setattr(model.config, field, [getattr(model.config, field)[i] for i in order])
    return model


# layers of BigBird and Reformer know more of their number than their pattern; ALBERT has one layer, run several times
WITH_LAYERS = [head for head in one_head() if HEADS[head] not in ("albert", "big_bird", "bigbird_pegasus")]


def four_layers(head: str, several: bool):
    counts = {
        name: 4
        for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer", "n_layers")
        if name in TINY[HEADS[head]]
    }
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2} if "layer_types" in TINY[HEADS[head]] else {}
    # GPT-2 may divide scores by the number of the layer, which a loaded one has anew
    scales = {"scale_attn_by_inverse_layer_idx": False} if head.startswith("GPT2") else {}
    dense = dense_model(head, **counts, **types, **scales)
    two = has_two_stacks(HEADS[head])
    layers = {
        f"{stack}{layer}": f"window({9 + layer}, 0)"
        for stack in (("encoder ", "decoder ") if two else ("",))
        for layer in range(4)
    }
    return sparse_hf.sparsify(dense, "window(9, 0)", layers if several else None).eval()


def answers(model, head: str) -> torch.Tensor:
    batch = {name: value for name, value in inputs(head).items() if "label" not in name and "positions" not in name}
    # without a cache, of which layers with the same number would share one
    cache = {"use_cache": False} if "use_cache" in model.forward.__signature__.parameters else {}
    with torch.no_grad():
        return model(**batch, **cache)[0]


@pytest.mark.cross
@pytest.mark.parametrize("several", [False, True], ids=["one pattern", "several patterns"])
@pytest.mark.parametrize("renumber", [True, False], ids=["renumbered", "as they were"])
@pytest.mark.parametrize("head", WITH_LAYERS)
def test_dropped_layers_are_saved_so_that_they_load(head, renumber, several, tmp_path, warnings):
    model = chosen(four_layers(head, several), [0, 3], renumber)
    wanted = answers(model, head)
    model.save_pretrained(tmp_path)
    assert not any("loads as a dense model" in message for message in warnings.messages)
    assert torch.equal(answers(model, head), wanted)
    loaded = sparse_class(head).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(answers(loaded, head), wanted)
    names, patterns = (loaded.config.sparse_attention[key] for key in ("layers", "patterns"))
    last = names[-1] if isinstance(names, list) else names["encoder"][-1]
    if several:
        assert patterns[last] == ("window(10, 0)" if renumber else "window(12, 0)")


@pytest.mark.parametrize("head", [head for head in one_head() if HEADS[head] != "albert"])
def test_each_layer_has_the_pattern_of_its_number(head):
    dense, config = dense_model(head), sparse_class(head).config_class(**TINY[HEADS[head]])
    stacks = {f"{stack} " * bool(stack): count for stack, count in config.stacks.items()}
    assert set(stacks.values()) == {2}
    every = {f"{stack}{layer}": "window(3, 0)" for stack in stacks for layer in range(2)}
    model = sparse_hf.sparsify(dense, "window(3, 0)", every)
    assert layer_numbers(model, config.stacks) == dict.fromkeys(config.stacks, [0, 1])
    # a layer with another pattern shows, and each in its own way
    changed = [every | {where: "window(40, 0)"} for where in every]
    found = [answers(made, head) for made in (model, *(sparse_hf.sparsify(dense, "window(3, 0)", c) for c in changed))]
    assert min((one - other).abs().max() for one, other in combinations(found, 2)) > 1e-4


@pytest.mark.parametrize("head", sampled(WITH_LAYERS[::3], WITH_LAYERS))
def test_repeated_layers_are_saved_so_that_they_load(head, tmp_path):
    model = chosen(four_layers(head, several=False), [0, 1, 2, 1, 2, 3], renumber=True)
    if len(model.config.sparse_attention["patterns"]) > 1:
        # the pattern was cut to windows of the family's own
        with pytest.raises(ValueError, match="names 4 layers, of different patterns, and a layer has the number 4"):
            model.save_pretrained(tmp_path)
        return
    wanted = answers(model, head)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(answers(sparse_class(head).from_pretrained(tmp_path).eval(), head), wanted)


def test_repeated_layers_of_several_patterns_want_to_be_told_which(tmp_path):
    model = chosen(four_layers("LlamaForCausalLM", several=True), [0, 1, 2, 1, 2, 3], renumber=True)
    message = "names 4 layers, of different patterns, and a layer has the number 4"
    with pytest.raises(ValueError, match=message):
        answers(model, "LlamaForCausalLM")
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    names = model.config.sparse_attention["layers"]
    model.config.sparse_attention["layers"] = [names[i] for i in (0, 1, 2, 1, 2, 3)]
    for module in model.modules():
        # copies of layers have copies of the configuration
        if hasattr(module, "config"):
            module.config = model.config
    wanted = answers(model, "LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        answers(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), "LlamaForCausalLM"), wanted
    )


@pytest.mark.parametrize("head", ["BertModel", "LlamaModel", "GPT2Model"])
def test_fewer_layers_asked_for_at_load(head, tmp_path, warnings):
    sparse_hf.sparsify(dense_model(head), "window(9, 0)", {1: "window(4, 0)"}).save_pretrained(tmp_path / "two")
    model = AutoModel.from_pretrained(tmp_path / "two", num_hidden_layers=1).eval()
    assert model.config.sparse_attention["layers"] == ["sparse"]
    assert any("named 2 layers, and the model has 1" in message for message in warnings.messages)
    model.save_pretrained(tmp_path / "one")
    torch.testing.assert_close(answers(AutoModel.from_pretrained(tmp_path / "one").eval(), head), answers(model, head))


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("mistral", "sliding_window", 8),
        ("gemma2", "sliding_window", 8),
        ("qwen2", "layer_types", ["full_attention", "full_attention"]),
        ("modernbert", "local_attention", 8),
        ("big_bird", "block_size", 8),
        ("longformer", "attention_window", 8),
        ("led", "attention_window", 8),
        ("reformer", "num_hashes", 4),
    ],
)
def test_fields_that_a_pattern_was_made_from_say_that_they_matter_no_more(family, field, value, tmp_path, warnings):
    config_class = sparse_hf.FAMILIES[family].config_class
    pattern = None if config_class.implies_pattern else "window(None, 0)"
    values = {} if config_class.implies_pattern else TINY[family]
    config = config_class.from_dense(config_class.__bases__[1](**values), pattern)
    before = dict(config.sparse_attention)
    setattr(config, field, getattr(config, field))
    assert not warnings.messages
    config.save_pretrained(tmp_path)
    setattr(config, field, value)
    loaded = AutoConfig.from_pretrained(tmp_path, **{field: value})
    assert config.sparse_attention == loaded.sparse_attention == before and getattr(loaded, field) == value
    said = [message for message in warnings.messages if f"{field}={value!r} changes no pattern" in message]
    assert len(said) == 2 and all(f"{config_class.__name__}.from_dense(config, pattern)" in message for message in said)
    # the remedy
    assert config_class.from_dense(loaded, pattern).sparse_attention != before


@pytest.mark.parametrize(("family", "field"), [("mistral", "sliding_window"), ("longformer", "attention_window")])
def test_without_a_pattern_such_fields_have_their_effect(family, field, warnings):
    config = sparse_hf.FAMILIES[family].config_class(**{field: 40})
    setattr(config, field, 8)
    window = "window(7, 0)" if family == "mistral" else "window(4, 4)"
    assert window in config.layer_pattern(0) and not warnings.messages


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ("gpt2", "'gpt2'"),
        (Path("folder"), "PosixPath\\('folder'\\)"),
        (nn.Linear(2, 2), "a Linear"),
        (None, "a NoneType"),
    ],
)
def test_sparsify_takes_loaded_models(given, got):
    with pytest.raises(ValueError, match=f"takes a model of Transformers that is loaded, and got {got}; load it"):
        sparse_hf.sparsify(given, "window(3, 3)")


def test_an_encoder_with_a_window_of_its_own_is_asked_itself():
    """Transformers' own tests scale rotary positions by this way; caches of decoders are made by a copy that does not slide."""
    config = sparse_hf.sparsify(dense_model("ModernBertModel"), "window(7, 7)").config
    assert "sliding_attention" in config.layer_types and config.get_text_config(decoder=True) is config
    decoder = sparse_hf.sparsify(dense_model("Gemma2ForCausalLM"), "window(7, 0)").config
    assert "sliding_attention" in decoder.layer_types
    assert set(decoder.get_text_config(decoder=True).layer_types) == {"full_attention"}


@pytest.mark.parametrize("head", ["Qwen3ForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"])
def test_what_is_set_on_the_configuration_for_caches_is_set_on_the_models(head):
    """Quantisation (torchao) and tools for rope set values on what `get_text_config(decoder=True)` gives."""
    config = sparse_hf.sparsify(dense_model(head), "window(7, 0)").config
    found, types = config.get_text_config(decoder=True), getattr(config, "layer_types", None)
    found.tie_word_embeddings = not config.tie_word_embeddings
    found.rope_theta_of_mine = 5.0
    assert found.tie_word_embeddings == config.tie_word_embeddings and config.rope_theta_of_mine == 5.0
    for copied in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(copied) is type(config) and copied.to_dict() == config.to_dict()
    assert getattr(config, "layer_types", None) == types


@pytest.mark.parametrize("head", one_head())
@pytest.mark.parametrize("pattern", ["lsh(4) | window(3, 3)", "topk(8) | window(3, 3)", "threshold(0.1)"])
@torch.no_grad()
def test_patterns_that_choose_by_content_run_or_are_refused_at_once(head, pattern):
    try:
        model = sparse_hf.sparsify(dense_model(head), pattern)
    except ValueError as error:
        added = (
            r"chooses pairs by products of queries and keys, and sparse_\w+ (adds|caps).*give a pattern of positions"
        )
        assert re.search(added, str(error))
        return
    found = model(**inputs(head, "none"))
    assert all(t.isfinite().all() for t in found.values() if isinstance(t, torch.Tensor))


def test_what_positions_weigh_is_read_from_the_configuration():
    def refused(head: str, pattern: str, layers=None, **changes) -> bool:
        try:
            sparse_hf.sparsify(dense_model(head, **changes), pattern, layers=layers)
        except ValueError:
            return True
        return False

    assert refused("FalconForCausalLM", "topk(8)", alibi=True) and not refused("FalconForCausalLM", "topk(8)")
    assert refused("Gemma2ForCausalLM", "lsh(4)")
    # behind one that may be
    assert refused("Gemma2ForCausalLM", "topk(8)", {1: "lsh(4)"}) and not refused("Gemma2ForCausalLM", "topk(8)")
    assert not refused("Gemma2ForCausalLM", "lsh(4)", attn_logit_softcapping=None)
    assert not refused("DebertaV2Model", "topk(8)", relative_attention=False)
