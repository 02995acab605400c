"""What layers hear by their windows is what they hear by their pairs, and it is said where a pattern is chosen."""

from __future__ import annotations

import logging

import pytest
from transformers import BartForCausalLM
from transformers.utils import logging as transformers_logging

from sparse_hf import build_plan, sparsify
from sparse_hf.conversion import describe_conversion
from sparse_hf.models.hf.hearing import hearing, hearing_warnings, is_causal
from sparse_hf.models.hf.layers import stacks_of
from sparse_hf.plan.heard import heard
from tests.models.families import dense_model, is_decoder, one_head

LENGTH = 200
# pattern, layers -> by hand: what a decoder hears to the left, and an encoder to both sides
KNOWN = [
    ("window(20, 0)", None, 40, (40, 0)),
    ("window(20, 5)", None, 40, (40, 10)),
    ("window(20, 7) | first(4)", None, 40, (None, None)),
    ("window(20, 7)", "0=dense", None, (None, None)),
    ("window(20, 7)", "1=window(3, 3)", 23, (23, 10)),
    ("window(20, 7) | marked()", None, None, (None, None)),
    ("stride(16)", None, "unknown", "unknown"),
]


@pytest.mark.parametrize(("pattern", "layers", "of_decoder", "of_encoder"), KNOWN)
@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertModel"])
def test_windows_of_layers_add_up(head, pattern, layers, of_decoder, of_encoder):
    is_causal = head == "LlamaForCausalLM"
    config = sparsify(dense_model(head), pattern, layers).config
    found = hearing(config, is_causal)
    wanted = of_decoder if is_causal else of_encoder
    if wanted == "unknown":
        assert found is None
        return
    left, right = (wanted, None) if is_causal else wanted
    assert found is not None and (found.left, found.right) == (left, right)
    if "marked" in pattern:
        return
    plans = [build_plan(config.layer_pattern(layer, is_causal), LENGTH) for layer in range(2)]
    middle = LENGTH // 2
    # the first tokens of a decoder are heard beside the window
    places = [
        int(place) for place in heard(plans, middle).nonzero() if place >= 4 or "first" not in pattern or not is_causal
    ]
    assert middle - min(places) == min(middle if left is None else left, middle)
    if not is_causal:
        assert max(places) - middle == min(LENGTH - 1 - middle if right is None else right, LENGTH - 1 - middle)


def said(head: str, pattern: str, layers: str | None = None, length: int | None = 512) -> list[str]:
    config = sparsify(dense_model(head), pattern, layers).config
    return hearing_warnings(config, head.endswith("ForCausalLM"), length)


def test_layers_that_slide_by_themselves_are_not_to_be_made_dense():
    # the second of two layers sees everything in the dense family
    assert any("(layers='1=dense')" in text for text in said("Gemma3ForCausalLM", "window(20, 0)"))
    slides = [text for text in said("MistralForCausalLM", "window(5, 0)") if "hears at most" in text]
    assert slides and "dense" not in slides[0] and "widen the windows" in slides[0]


def test_what_is_not_heard_is_said():
    short, bare = said("LlamaForCausalLM", "window(20, 0)")
    assert "through the model's 2 layers a token hears at most 40 tokens back, and texts may have 512" in short
    assert "nothing is global in 2 of the model's 2 layers" in bare and "`| first(4)`" in bare
    assert len(said("LlamaForCausalLM", "window(20, 0) | first(4)")) == 1
    assert said("LlamaForCausalLM", "window(20, 0) | first(4)", "0=dense") == []
    assert said("LlamaForCausalLM", "window(400, 0) | first(4)") == []
    assert said("LlamaForCausalLM", "window(20, 0)", length=None) == []


def test_encoders_hear_by_global_tokens():
    (short,) = said("BertModel", "window(20, 20)")
    assert "at most 40 tokens away" in short and "`| first(1)` or `| marked()`" in short
    assert said("BertModel", "window(20, 20) | first(1)") == []


def test_of_an_encoder_decoder_each_stack_is_looked_at():
    found = said("BartModel", "window(20, 20)", "decoder=window(400, 0)")
    assert [text for text in found if "the encoder's 2 layers" in text]
    assert [text for text in found if "global in 2 of the decoder's 2 layers" in text]


def test_of_one_stack_by_itself_nothing_is_said_of_the_other():
    whole = dense_model("BartModel")
    for side, dense in (("encoder", whole.get_encoder()), ("decoder", BartForCausalLM(whole.config))):
        alone = sparsify(dense, "window(20, 20)")
        assert stacks_of(alone) == [side]
        warnings = hearing_warnings(alone.config, side == "decoder", 512, stacks_of(alone))
        assert warnings and all(f"the {side}'s" in text for text in warnings)


def test_windows_of_the_family_are_as_they_were_trained():
    assert said("MistralForCausalLM", "window(None, 0)") == []
    assert len(said("MistralForCausalLM", "window(10, 0)")) == 2


def test_sparsify_says_it_once(caplog):
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                sparsify(dense_model("LlamaForCausalLM"), "window(21, 0) | first(4)")
    finally:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_propagation()
    found = [message for message in caplog.messages if "a token hears at most 42 tokens back" in message]
    assert len(found) == 1 and found[0].startswith("LlamaForCausalLM: ")


def test_a_conversion_says_it_in_its_report(tmp_path):
    dense_model("BertModel").save_pretrained(tmp_path)
    found = describe_conversion(tmp_path, "window(20, 20)", max_length=1024)["warnings"]
    assert any("at most 40 tokens away, and texts may have 1,024" in text for text in found)
    assert any("made for 512 tokens and is to read 1,024" in text for text in found)
    assert describe_conversion(tmp_path, "window(300, 300)")["warnings"] == []


@pytest.mark.parametrize("head", [head for head in one_head() if is_decoder(head)])
def test_a_dense_decoder_sees_its_past_only(head):
    dense = dense_model(head)
    assert is_causal(dense) and is_causal(sparsify(dense, "window(20, 0) | first(4)"))


def test_a_conversion_of_alibi_decoders_counts_pairs_of_the_past(tmp_path):
    for head in ("BloomForCausalLM", "MptForCausalLM"):
        dense_model(head).save_pretrained(tmp_path / head)
        (layers,) = describe_conversion(tmp_path / head, "window(20, 0) | first(4)")["layers"]
        assert layers["pattern"] == "(window(20, 0) | first(4)) & window(None, 0)"
