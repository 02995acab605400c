"""Models of text and images: their text made sparse, tokens of an image marked."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

import sparse_hf
from sparse_hf.models.derived import check as checks
from sparse_hf.models.hf.indexer import Indexer
from tests.processes import printed

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
AXES = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32, "num_heads": 2}
# class -> its configuration, tokens of an image, and the image: numbers of patches in a row, or pixels
MODELS = {
    "Qwen2VLForConditionalGeneration": (
        {"text_config": AXES, **IDS, "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}},
        8, (32, 3 * 2 * 14 * 14),
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        {"text_config": AXES, **IDS, "vision_config": {**QWEN, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}},
        8, (32, 3 * 2 * 14 * 14),
    ),
    "Qwen3VLForConditionalGeneration": (
        {"text_config": AXES, **IDS, "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}},
        8, (32, 3 * 2 * 16 * 16),
    ),
    "Gemma3ForConditionalGeneration": (
        {"text_config": {**TEXT, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
         "vision_config": {**TOWER, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
         "boi_token_index": START, "eoi_token_index": END},
        4, (1, 3, 28, 28),
    ),
    "LlavaForConditionalGeneration": (
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**TOWER, "model_type": "clip_vision_model"},
         "image_token_index": IMAGE},
        16, (1, 3, 28, 28),
    ),
    "SmolVLMForConditionalGeneration": (
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": TOWER, "image_token_id": IMAGE, "scale_factor": 2,
         "pad_token_id": 0},
        4, (1, 1, 3, 28, 28),
    ),
    # which makes the mask of its text itself
    "PaliGemmaForConditionalGeneration": (
        {"text_config": {**TEXT, "model_type": "gemma"}, "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
         "image_token_id": IMAGE, "projection_dim": 64},
        16, (1, 3, 28, 28),
    ),
}  # fmt: skip
# with which the texts of Gemma 3 and PaliGemma say which tokens see each other
TYPES = {"Gemma3ForConditionalGeneration": "token_type_ids", "PaliGemmaForConditionalGeneration": "token_type_ids"}
NEAR = "window(3, 0) | marked()"


def made(name: str):
    """A tiny dense model, and a text with an image in its beginning."""
    config, tokens, image = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.15)
    ids = torch.tensor([[5, 6, 7, 8] * 2 + [START] + [IMAGE] * tokens + [END] + list(range(3, 30))])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(image)}
    if len(image) == 2:
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 8]]), "mm_token_type_ids": (ids == IMAGE).long()}
    if name in TYPES:
        inputs[TYPES[name]] = (ids == IMAGE).long()
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_sparse_and_an_image_is_global(name):
    dense, inputs = made(name)
    of_dense = dense.config._attn_implementation, dense.config.vision_config._attn_implementation
    with torch.no_grad():
        wanted = dense(**inputs).logits
        full = sparse_hf.sparsify(dense, "window(None, None)")
        assert type(full).__name__ == f"Sparse{name}" and isinstance(full, type(dense))
        # Gemma 3's mask lets tokens of an image see those behind them, in layers with a window too
        torch.testing.assert_close(full(**inputs).logits, wanted, atol=2e-4, rtol=1e-4)
        shared = {id(p) for p in dense.parameters()}
        assert {id(p) for p in full.parameters()} == shared
        blind = sparse_hf.sparsify(dense, "window(3, 0)")
        seeing = sparse_hf.sparsify(dense, NEAR, global_token_ids=[IMAGE])
        others = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
        # the last token is many windows behind the image
        assert torch.equal(blind(**inputs).logits[:, -1], blind(**others).logits[:, -1])
        found = seeing(**inputs).logits
        assert not torch.allclose(found[:, -1], seeing(**others).logits[:, -1], atol=1e-2)
        # found by id, or said
        marks = (inputs["input_ids"] == IMAGE).long()
        said = sparse_hf.sparsify(dense, NEAR)(**inputs, global_attention_mask=marks).logits
        torch.testing.assert_close(said, found)
        torch.testing.assert_close(dense(**inputs).logits, wanted)
    assert (dense.config._attn_implementation, dense.config.vision_config._attn_implementation) == of_dense


def test_the_indexers_of_a_text_have_the_sizes_that_are_asked_for():
    dense, _ = made("LlavaForConditionalGeneration")
    model = sparse_hf.sparsify(dense, "topk(5, 'indexer')", indexer={"heads": 2, "width": 12})
    assert [(one.heads, one.width) for one in model.modules() if isinstance(one, Indexer)] == [(2, 12)] * 2


@pytest.mark.parametrize("name", MODELS)
def test_it_generates_and_a_saved_folder_is_as_sparse(name, tmp_path):
    dense, inputs = made(name)
    sparse = sparse_hf.sparsify(dense, NEAR, global_token_ids=[IMAGE])
    more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    texts = [sparse.generate(**inputs, **more, use_cache=cache).tolist() for cache in (True, False)]
    marks = (inputs["input_ids"] == IMAGE).long()
    texts.append(sparse_hf.sparsify(dense, NEAR).generate(**inputs, **more, global_attention_mask=marks).tolist())
    texts.append(sparse.generate(**inputs, **more, cache_implementation="static", disable_compile=True).tolist())
    assert all(text == texts[0] for text in texts)
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(sparse) and loaded.config.text_config.layer_patterns() == [
        NEAR if "Gemma3" not in name else f"({NEAR}) & window(23, 0)",
        NEAR,
    ]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, sparse(**inputs).logits)


def test_a_fresh_process_loads_a_saved_folder(tmp_path):
    dense, inputs = made("LlavaForConditionalGeneration")
    sparse_hf.sparsify(dense, NEAR, global_token_ids=[IMAGE]).save_pretrained(tmp_path)
    code = f"""
import sparse_hf
from transformers import AutoModelForImageTextToText
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r})
print(type(model).__name__, type(model.model.language_model).__name__, model.model.language_model.config.layer_patterns())
"""
    said = f"SparseLlavaForConditionalGeneration SparseLlamaModel {[NEAR] * 2}"
    assert printed(code).splitlines()[-1] == said


def test_a_text_that_was_replaced_in_a_dense_model_is_said_to_load_as_dense(tmp_path, caplog):
    dense, _ = made("Qwen2VLForConditionalGeneration")
    dense.model.language_model = sparse_hf.sparsify(dense.model.language_model, NEAR)
    dense.config.text_config = dense.model.language_model.config
    logger = transformers.utils.logging.get_logger("sparse_hf.models.hf.saving")
    logger.addHandler(caplog.handler)
    dense.save_pretrained(tmp_path)
    assert "reads that part as a dense one; make Qwen2VLForConditionalGeneration sparse" in caplog.text
    caplog.clear()
    sparse_hf.sparsify(made("Qwen2VLForConditionalGeneration")[0], NEAR).save_pretrained(tmp_path / "whole")
    logger.removeHandler(caplog.handler)
    assert not caplog.text


def test_a_class_that_computes_with_the_mask_of_its_text_is_refused(monkeypatch):
    module = transformers.models.paligemma.modeling_paligemma
    made_mask = module.create_causal_mask
    monkeypatch.setattr(module, "create_causal_mask", lambda **given: made_mask(**given) * 2)
    monkeypatch.setattr(checks, "_PASSED", {})
    with pytest.raises(
        ValueError, match="a tiny copy of PaliGemmaForConditionalGeneration cannot be made sparse in its text"
    ):
        sparse_hf.sparsify(made("PaliGemmaForConditionalGeneration")[0], "window(3, 0)")


def test_a_model_that_only_compares_is_not_taken_for_one_that_writes():
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**text, "image_size": 28, "patch_size": 7})
    with pytest.raises(ValueError, match="CLIPModel has no sparse counterpart, and models within it have: "):
        sparse_hf.sparsify(transformers.CLIPModel(config), "window(3, 3)")
