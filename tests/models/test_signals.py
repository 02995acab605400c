"""Encoders of sounds, pictures and proteins that are derived: the dense class under the same pairs, whatever it reads."""

from __future__ import annotations

import pytest
import torch
import transformers

import sparse_hf
from sparse_hf.bench.cases import attending_by
from sparse_hf.models.derived.attention_modules import calls_interface
from sparse_hf.models.derived.check import tensors_of
from sparse_hf.models.derived.entry import dense_config_class
from sparse_hf.models.derived.samples import fresh
from sparse_hf.models.derived.tiny_model import apart, tiny_with_inputs
from sparse_hf.models.hf.register import dense_class, family_of
from tests.zoo.trial import NEEDED

NARROW = "window(3, 2) | first(1)"
# model type -> the class that is compared
ENCODERS = {
    "whisper": "WhisperForAudioClassification",
    "wav2vec2": "Wav2Vec2Model",
    "hubert": "HubertModel",
    "moonshine_streaming_encoder": "MoonshineStreamingEncoder",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip_vision_model": "SiglipVisionModel",
    "esm": "EsmForMaskedLM",
    "esmc": "EsmcForMaskedLM",
}


def tiny(model_type: str, name: str):
    """A tiny dense model under sdpa, and what it reads."""
    config = dense_config_class(model_type)(**NEEDED.get(model_type, {}))
    kind = next(dense_class(c) for c in family_of(model_type).classes if c.__name__ == f"Sparse{name}")
    with apart():
        dense, inputs, _ = tiny_with_inputs(kind, config)
    dense.config._attn_implementation = "sdpa"
    return dense, inputs


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_is_the_dense_one_under_the_same_mask(model_type, tmp_path):
    dense, inputs = tiny(model_type, ENCODERS[model_type])
    lengths = []
    hooks = [
        module.register_forward_hook(lambda m, i, out: lengths.append(out[0].shape[1]))
        for module in dense.modules()
        if calls_interface(type(module))
    ]
    with torch.no_grad():
        whole = tensors_of(dense(**fresh(inputs)))[0]
        for hook in hooks:
            hook.remove()
        place = torch.arange(lengths[0])
        held = sparse_hf.Pattern.parse(NARROW).allows(place[:, None], place)[None, None]
        with attending_by(held):
            wanted = tensors_of(dense(**fresh(inputs)))[0]
        assert not torch.allclose(wanted, whole, atol=1e-2)
        full = sparse_hf.sparsify(dense, "window(None, None)")
        torch.testing.assert_close(tensors_of(full(**fresh(inputs)))[0], whole, atol=2e-4, rtol=1e-4)
        sparse = sparse_hf.sparsify(dense, NARROW)
        found = tensors_of(sparse(**fresh(inputs)))[0]
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        sparse.save_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        loaded = type(sparse).from_pretrained(tmp_path, config=config).eval()
        torch.testing.assert_close(tensors_of(loaded(**fresh(inputs)))[0], found)


@pytest.mark.parametrize("model_type", ["wav2vec2-bert", "parakeet_encoder"])
def test_a_bias_by_content_is_refused_by_what_it_is(model_type):
    family = family_of(model_type)
    with pytest.raises(ValueError, match="adds a bias to each pair of tokens that depends on what is in them"):
        config = dense_config_class(model_type)()
        family.config_class.from_dense(config, NARROW)


def test_attention_to_a_sound_stays_dense():
    """The decoder of Moonshine Streaming has one class of attention, for itself and for the sound."""
    dense, inputs = tiny("moonshine_streaming", "MoonshineStreamingDecoder")
    sparse = sparse_hf.sparsify(dense, "window(1, 0)")
    with torch.no_grad():
        before = sparse(**fresh(inputs))[0]
        inputs["encoder_hidden_states"][:, -1] += torch.linspace(-2, 2, inputs["encoder_hidden_states"].shape[-1])
        after = sparse(**fresh(inputs))[0]
    assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-3)


def test_a_head_that_pools_reads_the_mask_of_patches():
    dense, inputs = tiny("siglip2_vision_model", "Siglip2VisionModel")
    inputs["pixel_attention_mask"][:, 40:] = 0
    with torch.no_grad():
        wanted, found = (
            m(**fresh(inputs)).pooler_output for m in (dense, sparse_hf.sparsify(dense, "window(None, None)"))
        )
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
