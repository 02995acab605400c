"""Families that are no entry of the table: derived when they are first met, and compared with their dense class."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

import sparse_hf
from sparse_hf.models.dense_families import DENSE_FAMILIES
from sparse_hf.models.derived import check as checks
from sparse_hf.models.derived.derive import main_class
from sparse_hf.models.derived.entry import dense_config_class
from sparse_hf.models.derived.positions import find_positions
from tests.processes import printed

TEXT = 60
COMMON = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = {**COMMON, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
# class of Transformers -> its configuration
MODELS = {
    "GlmForCausalLM": COMMON,
    "EuroBertForMaskedLM": COMMON,
    "Starcoder2ForCausalLM": {**COMMON, "sliding_window": None},
    "GptOssForCausalLM": {**MOE, "layer_types": ["full_attention"] * 3},
    "Lfm2ForCausalLM": HYBRID,
    "Llama4ForCausalLM": {**MOE, "intermediate_size_mlp": 64, "layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 0, 1]},
    "GPTBigCodeForCausalLM": {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}  # fmt: skip


def dense_model(name: str, **changes):
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    torch.manual_seed(0)
    model = model_class(config_class(**{**MODELS.get(name, {}), **changes})).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.15)
    return model


def some_text(model, rows: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 97, (rows, TEXT))


@pytest.mark.parametrize("name", MODELS)
def test_a_derived_model_is_the_dense_one_under_the_same_mask(name):
    dense = dense_model(name)
    text, ids = "window(6, 3) | first(2)", some_text(dense)
    sparse = sparse_hf.sparsify(dense, text)
    assert type(sparse).__name__ == f"Sparse{name}" and isinstance(sparse, type(dense))
    place = torch.arange(TEXT)
    held = sparse_hf.Pattern.parse(text).allows(place[:, None], place)
    if not name.endswith("MaskedLM"):
        held = held & (place[:, None] >= place)
    mask = torch.where(held, 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    with torch.no_grad():
        wanted, found = dense(ids, attention_mask=mask).logits, sparse(ids).logits
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(dense(ids).logits, wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "changes", "patterns"),
    [
        ("Starcoder2ForCausalLM", {"sliding_window": 9}, ["window(8, 0)"] * 3),
        ("PhimoeForCausalLM", {**MOE, "sliding_window": 9}, ["window(8, 0)"] * 3),
        ("GptOssForCausalLM", {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
         ["window(8, 0)", "window(None, None)", "window(8, 0)"]),
        ("Llama4ForCausalLM", {"attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention", "chunked_attention"]},
         ["chunk(16, 0, 0)", "window(None, None)", "chunk(16, 0, 0)"]),
    ],
)  # fmt: skip
def test_windows_and_chunks_of_the_family_stay(name, changes, patterns):
    dense = dense_model(name, **changes)
    sparse = sparse_hf.sparsify(dense, "window(None, None)")
    assert sparse.config.layer_patterns() == patterns
    with torch.no_grad():
        torch.testing.assert_close(
            sparse(some_text(dense)).logits, dense(some_text(dense)).logits, atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("entry", DENSE_FAMILIES, ids=lambda entry: entry.dense_type)
def test_positions_are_found_as_the_table_lists_them(entry):
    config_class = dense_config_class(entry.dense_type)
    found = find_positions(main_class(config_class), config_class())
    for field in ("scheme", "offset", "counted", "limit", "skips_padding"):
        assert getattr(found, field) == getattr(entry.positions, field), field
    assert found.grows and bool(found.tables) == bool(entry.positions.tables)
    assert all(name.endswith(entry.positions.tables) for name in found.tables)


@pytest.mark.parametrize(
    ("first", "more"),
    [("import sparse_hf", ""), ("import os", ", trust_remote_code=True")],
    ids=["import", "remote code"],
)
def test_a_saved_folder_loads_in_a_fresh_process(first, more, tmp_path):
    dense = dense_model("GlmForCausalLM")
    sparse = sparse_hf.sparsify(dense, "window(6, 0) | first(2)", "1=dense")
    sparse.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = float(sparse(some_text(dense)).logits.double().sum())
    code = f"""
{first}
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}{more}).eval()
torch.manual_seed(1)
with torch.no_grad():
    answer = model(torch.randint(3, 97, (2, {TEXT}))).logits.double().sum()
print(type(model).__name__, model.config.sparse_attention["layers"], float(answer))
"""
    name, layers, found = re.fullmatch(r"(\w+) (\[.*\]) (\S+)", printed(code).splitlines()[-1]).groups()
    assert name == "SparseGlmForCausalLM" and layers == "['sparse', 'dense', 'sparse']"
    assert float(found) == pytest.approx(wanted, rel=1e-4, abs=1e-2)


def test_auto_classes_know_a_derived_type_by_its_name():
    config = AutoConfig.for_model("sparse_glm", **COMMON, pattern="window(6, 0)")
    model = AutoModel.from_config(config)
    assert type(model) is sparse_hf.SparseGlmModel and not sparse_hf.FAMILIES["glm"].verified
    assert "sparse_glm" not in dir(sparse_hf) and "SparseGlmModel" not in dir(sparse_hf)


def test_a_converted_folder_grows_a_table_that_was_found(tmp_path):
    dense = dense_model("GPTBigCodeForCausalLM")
    dense.save_pretrained(tmp_path / "dense")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "window(20, 0)", max_length=200, progress=False)
    sparse = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    table = sparse.transformer.wpe.weight
    assert table.shape[0] == 200 and torch.equal(table[128:], dense.transformer.wpe.weight[:72])
    assert sparse(torch.randint(3, 97, (1, 190))).logits.shape == (1, 190, 97)
    with pytest.raises(ValueError, match="a row has 201 tokens; sparse_gpt_bigcode has positions for 200"):
        sparse(torch.randint(3, 97, (1, 201)))


def test_what_cannot_grow_is_said_before_anything_is_written(tmp_path):
    config = transformers.WhisperConfig(vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=60, max_target_positions=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ValueError, match="not found to be a table of tokens in a row that could grow: leave max_length out"
    ):
        sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "window(20, 20)", max_length=200, progress=False)
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            "0=dense",
            r"layers names layer 0, which is of another kind .* attention layers of this sparse_lfm2 model are 1, 3",
        ),
        ({"2": "window(3, 0)"}, "layers names layer 2"),
    ],
)
def test_layers_of_another_kind_take_no_pattern(layers, message):
    with pytest.raises(ValueError, match=message):
        sparse_hf.sparsify(dense_model("Lfm2ForCausalLM"), "window(6, 0)", layers)


def test_layers_number_attention_among_others():
    sparse = sparse_hf.sparsify(dense_model("Lfm2ForCausalLM"), "window(6, 0)", "3=dense")
    assert sparse.config.attention_layers == [1, 3]
    assert [sparse.config.layer_pattern(layer) for layer in (1, 3)] == ["window(6, 0)", "window(None, None)"]


def test_a_model_without_attention_layers_takes_no_pattern():
    config = transformers.Lfm2Config(**{**HYBRID, "layer_types": ["conv"] * 4})
    with pytest.raises(ValueError, match="no attention|has no attention layer"):
        sparse_hf.SparseLfm2Config.from_dense(config, "window(6, 0)")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("longt5", "encoder.block.0 of LongT5ForConditionalGeneration, a LongT5Block, mixes tokens without asking for our attention"),
        ("doge", "computes with the mask of all pairs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_was_seen(model_type, message):
    family = sparse_hf.family_of(model_type)
    dense = next(sparse_hf.dense_class(c) for c in family.classes if c.__name__.endswith(("CausalLM", "Generation")))
    with pytest.raises(ValueError, match=message):
        checks.check(dense, dense_config_class(model_type)())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("xlnet", "it computes attention by itself, .*, and adds scores of positions that depend on content"),
        ("llava", "it has no layers of its own, and the models within it have"),
        ("nothing", "Transformers does not know it either"),
    ],
)
def test_what_no_pattern_can_reach_is_refused_by_name(model_type, message):
    with pytest.raises(ValueError, match=f"'{model_type}' has no sparse counterpart: {message}"):
        sparse_hf.family_of(model_type)


def test_a_layer_that_goes_another_way_is_seen(monkeypatch):
    """Attention of one layer that never asks the interface stays dense in silence, but for the check."""
    module = transformers.models.glm.modeling_glm
    forward = module.GlmAttention.forward

    def past_us(self, hidden_states, *args, **kwargs):
        if self.layer_idx == 1:
            mean = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[:, None]
            return mean, None
        return forward(self, hidden_states, *args, **kwargs)

    sparse_hf.family_of("glm")
    monkeypatch.setattr(module.GlmAttention, "forward", past_us)
    with pytest.raises(ValueError, match=r"model.layers.1 of GlmForCausalLM, .* mixes tokens without asking"):
        checks.check(transformers.GlmForCausalLM, transformers.GlmConfig())


def test_a_check_is_remembered_and_draws_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(checks, "check", lambda *given: calls.append(given))
    monkeypatch.setattr(checks, "_PASSED", {})
    dense = dense_model("GlmForCausalLM")
    for width in (6, 7):
        sparse_hf.sparsify(dense, f"window({width}, 0)")
    assert len(calls) == 1
    monkeypatch.undo()
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    checks.check(transformers.GlmModel, dense.config)
    assert torch.equal(torch.rand(1), wanted)


def test_a_model_inside_with_a_configuration_of_its_own_stays_dense():
    """Whether or not its family was met before: CSM's decoder of codebooks has a sparse class too."""
    sizes = {k: v for k, v in COMMON.items() if k != "pad_token_id"}
    codec = {
        "model_type": "mimi", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "num_filters": 4, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "codebook_size": 16,
        "upsample_groups": 32,
    }  # fmt: skip
    depth = {**sizes, "backbone_hidden_size": 64}
    config = transformers.CsmConfig(**sizes, text_vocab_size=97, depth_decoder_config=depth, codec_config=codec)
    dense = transformers.CsmForConditionalGeneration(config).eval()
    assert "SparseCsmDepthDecoderModel" in sparse_hf.family_of("csm_depth_decoder_model").names
    sparse = sparse_hf.sparsify(dense, "window(6, 0)")
    assert type(sparse.depth_decoder) is transformers.CsmDepthDecoderForCausalLM
    attention = sparse.depth_decoder.model.layers[0].self_attn
    assert type(attention.config) is type(dense.depth_decoder.config)
    assert sparse.backbone_model.layers[0].self_attn.config is sparse.config


def test_layers_that_differ_are_told_of_their_windows_without_a_warning(caplog):
    config = transformers.NeoMMEConfig(
        vocab_size=97, embedding_dim=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"], pad_token_id=0
    )  # fmt: skip
    logger = transformers.utils.logging.get_logger("sparse_hf.models.hf.config")
    logger.addHandler(caplog.handler)
    sparse = sparse_hf.sparsify(transformers.NeoMMEForMaskedLM(config), "window(None, None)")
    logger.removeHandler(caplog.handler)
    assert "changes no pattern" not in caplog.text
    assert sparse.config.layer_patterns()[1] == "window(None, None)" != sparse.config.layer_patterns()[0]


@pytest.mark.parametrize("name", ["GlmForCausalLM", "GptOssForCausalLM", "Lfm2ForCausalLM"])
def test_tokens_from_a_cache_are_those_without(name):
    sparse = sparse_hf.sparsify(dense_model(name), "window(6, 0) | first(2)")
    given = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found, wanted = (sparse.generate(some_text(sparse), **given, use_cache=cache) for cache in (True, False))
    assert torch.equal(found, wanted)


def test_sinks_of_gpt_oss_are_alike_on_every_backend():
    dense = dense_model("GptOssForCausalLM")
    ids = some_text(dense)
    grads = {}
    for name in ("sparse_reference", "sparse_blockwise", "sparse"):
        sparse = sparse_hf.sparsify(dense, "window(6, 0) | first(2)")
        sparse.set_attn_implementation(name)
        dense.zero_grad()
        sparse(ids, labels=ids).loss.backward()
        grads[name] = [layer.self_attn.sinks.grad.clone() for layer in dense.model.layers]
    for found in grads.values():
        torch.testing.assert_close(found, grads["sparse_reference"], atol=1e-5, rtol=1e-4)
    assert all(g.abs().max() > 0 for g in grads["sparse"])
