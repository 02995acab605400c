"""Models made sparse in memory, and dense ones beside them: nothing loads as dense without a word.

The kind: others find a model by its name, its configuration or its class. Looked at: adapters and what TRL reads, saving by
another model (a user's own, an encoder-decoder of two), names of attention on dense models, models of several models.
"""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, BertModel, BertPreTrainedModel

import sparse_hf
from sparse_hf.models.hf.cache import given_cache
from tests.models.families import VOCABULARY, dense_model
from tests.processes import printed

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


class Mine(BertPreTrainedModel):
    """A user's own model."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()

    def forward(self, ids):
        return self.bert(ids)[0]


def text(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def two_models() -> transformers.EncoderDecoderModel:
    decoder = BertLMHeadModel(BertConfig(**TINY, is_decoder=True, add_cross_attention=True))
    return transformers.EncoderDecoderModel(encoder=BertModel(BertConfig(**TINY)), decoder=decoder).eval()


@pytest.fixture
def said(caplog):
    logging.getLogger("sparse_hf").propagate = True
    return caplog


@pytest.mark.parametrize("name", ["sparse", "sparse_blockwise", "sparse_reference"])
def test_a_dense_model_says_what_to_do(name, tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match=rf"Llama is a dense model .*'{name}' .*sparse_hf.sparsify\(model"):
        loaded(text())
    # and it can be done
    assert sparse_hf.sparsify(loaded, "window(7, 0)")(text()).logits.isfinite().all()


def test_a_dense_model_says_so_before_any_family_is_derived(tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path)
    code = f"""
import torch, transformers, sparse_hf
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="sparse")
try:
    model(torch.ones(1, 9, dtype=torch.long))
except ValueError as error:
    print("sparse_hf.sparsify(model" in str(error), *sparse_hf.FAMILIES.derived())
"""
    assert printed(code).split()[-1] == "True"


def test_a_model_in_memory_names_no_folder(tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    sparse = sparse_hf.sparsify(dense, "window(7, 0)")
    again = sparse_hf.sparsify(sparse, "window(9, 0)")
    for model in (sparse, again):
        # what TRL loads another model by, and what an adapter writes down
        assert model.config._name_or_path == ""
        assert model.name_or_path.count("made sparse in memory: save_pretrained it, and load that folder") == 1
        assert model.model.name_or_path == model.name_or_path
    assert dense.name_or_path == dense.config._name_or_path == str(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert loaded.name_or_path == str(tmp_path / "sparse")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in .*made sparse in memory:UserWarning")
def test_an_adapter_is_not_loaded_onto_the_dense_model(tmp_path):
    peft = pytest.importorskip("peft")
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    wanted = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(sparse_hf.sparsify(dense, "window(7, 0)"), wanted).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises((OSError, ValueError), match="made sparse in memory"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    base = sparse_hf.sparsify(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), "window(7, 0)")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(text()).logits, adapted(text()).logits)


def test_a_users_model_around_a_sparse_one_says_that_the_pattern_is_lost(said, tmp_path):
    mine = Mine(BertConfig(**TINY)).eval()
    mine.bert = sparse_hf.sparsify(mine.bert, "window(2, 2)")
    # weights alone are asked for often, and say nothing of patterns
    mine.state_dict(), torch.nn.Sequential(mine).state_dict()
    assert "says nothing" not in said.text
    mine.save_pretrained(tmp_path)
    assert "what Mine saves says nothing of the pattern of 'bert', a sparse SparseBertModel" in said.text
    assert type(Mine.from_pretrained(tmp_path).bert) is BertModel


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_sparse_models_save_without_a_word(head, said, tmp_path):
    layers = {} if head.startswith("Bert") else {"layers": {"decoder": "window(7, 0)"}}
    sparse_hf.sparsify(dense_model(head), "window(7, 7)", **layers).save_pretrained(tmp_path)
    assert "says nothing of the pattern" not in said.text


def test_halves_of_two_models_are_saved_where_the_configuration_names_them(said, tmp_path):
    model, ids = two_models(), text()
    model.encoder = sparse_hf.sparsify(model.encoder, "window(3, 3)")
    model.decoder = sparse_hf.sparsify(model.decoder, "window(3, 0)")
    model.save_pretrained(tmp_path / "lost")
    for part in ("encoder", "decoder"):
        assert said.text.count(f"set model.config.{part} = model.{part}.config before saving") == 1
    said.clear()
    model.config.encoder, model.config.decoder = model.encoder.config, model.decoder.config
    model.save_pretrained(tmp_path / "named")
    assert "says nothing" not in said.text
    again = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "named").eval()
    assert type(again.encoder).__name__ == "SparseBertModel"
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (again, model))
    torch.testing.assert_close(found, wanted)


def test_models_of_models_say_which_can_be_made_sparse():
    with pytest.raises(
        ValueError, match=r"models within it have: encoder, decoder\..* model.config.encoder = model.encoder"
    ):
        sparse_hf.sparsify(two_models(), "window(4, 4)")
    with pytest.raises(ValueError, match=r"Mine has no sparse counterpart, and models within it have: bert\."):
        sparse_hf.sparsify(Mine(BertConfig(**TINY)), "window(4, 4)")
    with pytest.raises(ValueError, match="no pattern can reach it|has no sparse counterpart"):
        sparse_hf.sparsify(transformers.FNetModel(transformers.FNetConfig(**TINY)), "window(4, 4)")


def test_classes_of_ones_own_say_that_nobody_ships_them(monkeypatch):
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own_llama"

    class OwnModel(transformers.LlamaModel):
        config_class = OwnConfig

    monkeypatch.setitem(transformers.CONFIG_MAPPING._extra_content, "own_llama", OwnConfig)
    own = {**TINY, "num_key_value_heads": TINY["num_attention_heads"]}
    with pytest.raises(
        ValueError, match="'own_llama' has no sparse counterpart: its classes are none that Transformers ships"
    ):
        sparse_hf.sparsify(OwnModel(OwnConfig(**own)), "window(4, 0)")


def test_who_gives_something_else_is_told_in_a_line():
    with pytest.raises(ValueError, match="got 'gpt2'; load it with from_pretrained"):
        sparse_hf.sparsify("gpt2", "window(4, 0)")
    with pytest.raises(
        ValueError, match=r"made of a configuration, and got a SparseLlamaForCausalLM; give its \.config"
    ):
        sparse_hf.StreamingCache(sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(4, 0)"))


def test_an_output_is_not_asked_for_the_older_name_of_its_cache(monkeypatch):
    monkeypatch.setattr(transformers.utils.generic.logger, "warning_once", pytest.fail)
    cache = transformers.DynamicCache()
    with_one, without = (
        transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=torch.ones(1)) for _ in "ab"
    )
    with_one[next(name for name in ("cache", "past_key_values") if hasattr(with_one, name))] = cache
    assert given_cache(without) is None and given_cache(with_one) is cache
    assert given_cache({"past_key_values": cache}) is cache
