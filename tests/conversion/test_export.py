"""Export: plain Transformers gives the sparse model's answers, or a refusal says which layer it cannot say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import sparse_hf
from sparse_hf import First, Stride, Window, causal, full
from sparse_hf.conversion.export import _window, export
from tests.models.families import dense_model, inputs

FULL = "window(None, None)"


def saved(head: str, folder: Path, pattern: str, layers=None, **changes):
    sparse = sparse_hf.sparsify(dense_model(head, **changes), pattern, layers=layers).eval()
    sparse.save_pretrained(folder)
    return sparse


def compare(model, folder: Path, stock: str) -> None:
    """The stock class gives the same answers as a model for every real token."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [stock] and not {"sparse_attention", "auto_map"} & set(config)
    # SDPA of older versions of Transformers leaves Gemma 2's soft cap away
    attention = {"attn_implementation": "eager"} if stock.startswith("Gemma2") else {}
    stocked, told = auto_class(stock).from_pretrained(folder, output_loading_info=True, **attention)
    assert type(stocked) is getattr(transformers, stock) and not told["missing_keys"] and not told["unexpected_keys"]
    batch = inputs(type(model).__name__.removeprefix("Sparse"))
    with torch.no_grad():
        wanted, found = model(**batch), stocked.eval()(**batch)
    for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if name in wanted:
            real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
            pick = real if wanted[name].shape[:2] == real.shape else ...
            torch.testing.assert_close(found[name][pick], wanted[name][pick], atol=1e-5, rtol=1e-4)


def auto_class(stock: str) -> type:
    """An Auto class that gives the stock class."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        for found in () if mapping is None else mapping._model_mapping.values():
            if stock in ((found,) if isinstance(found, str) else found):
                return auto
    raise AssertionError(stock)


# head, pattern, layers, stock class, what config.json says
NATIVE = {
    "llama": ("LlamaForCausalLM", "window(39, 0)", None, "MistralForCausalLM", {"sliding_window": 40}),
    "llama classes": (
        "LlamaForSequenceClassification", "sliding_window(40)", None, "MistralForSequenceClassification",
        {"sliding_window": 40},
    ),
    "llama spans": (
        "LlamaForQuestionAnswering", "window(39, 39)", None, "MistralForQuestionAnswering", {"sliding_window": 40},
    ),
    "llama, dense": ("LlamaForCausalLM", FULL, None, "LlamaForCausalLM", {"model_type": "llama"}),
    "mistral": ("MistralForCausalLM", "window(19, 5)", None, "MistralForCausalLM", {"sliding_window": 20}),
    "mistral, dense": (
        "MistralForCausalLM", FULL, "0-1=dense", "MistralForCausalLM", {"sliding_window": None},
    ),
    "mixtral": ("MixtralForCausalLM", "window(24, 0)", None, "MixtralForCausalLM", {"sliding_window": 25}),
    "phi3": ("Phi3ForCausalLM", "window(24, 0)", None, "Phi3ForCausalLM", {"sliding_window": 25}),
    "qwen2": (
        "Qwen2ForCausalLM", "window(14, 0)", "1=dense", "Qwen2ForCausalLM",
        {"sliding_window": 15, "layer_types": ["sliding_attention", "full_attention"], "max_window_layers": 0},
    ),
    "qwen2, dense": (
        "Qwen2ForCausalLM", FULL, "1=dense", "Qwen2ForCausalLM",
        {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    ),
    "qwen3": (
        "Qwen3ForCausalLM", FULL, None, "Qwen3ForCausalLM",
        {"sliding_window": 30, "layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 1},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "window(14, 0)", None, "Qwen3MoeForCausalLM",
        {"sliding_window": 15, "use_sliding_window": True},
    ),
    "smollm3": (
        "SmolLM3ForCausalLM", "window(14, 0)", "0=dense", "SmolLM3ForCausalLM",
        {"sliding_window": 15, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma2": (
        "Gemma2ForCausalLM", "window(14, 0)", None, "Gemma2ForCausalLM",
        {"sliding_window": 15, "layer_types": ["sliding_attention"] * 2},
    ),
    "gemma2, dense": (
        "Gemma2ForCausalLM", FULL, "0=dense", "Gemma2ForCausalLM", {"layer_types": ["full_attention"] * 2},
    ),
    "gemma3": ("Gemma3ForCausalLM", "window(14, 0)", "1=dense", "Gemma3ForCausalLM", {"sliding_window": 15}),
    "cohere2": ("Cohere2ForCausalLM", "window(14, 0)", "1=dense", "Cohere2ForCausalLM", {"sliding_window": 15}),
    "modernbert": (
        "ModernBertForMaskedLM", "window(9, 9)", "0=dense", "ModernBertForMaskedLM", {"local_attention": 18},
    ),
    "bert, dense": ("BertForMaskedLM", FULL, None, "BertForMaskedLM", {"model_type": "bert"}),
    "bart, dense": ("BartForConditionalGeneration", "window(None, None)", None, "BartForConditionalGeneration", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", NATIVE)
def test_native_answers_as_the_sparse_model(case, tmp_path):
    head, pattern, layers, stock, fields = NATIVE[case]
    changes = {"layer_types": ["full_attention", "sliding_attention"]} if head == "ModernBertForMaskedLM" else {}
    if case == "gemma3":
        changes = {"layer_types": ["sliding_attention", "full_attention"]}
    sparse = saved(head, tmp_path / "sparse", pattern, layers, **changes)
    assert export(tmp_path / "sparse", tmp_path / "out", "native", progress=False) == tmp_path / "out"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in fields} == fields
    assert ("layer_types" in config) is ("layer_types" in json.loads((tmp_path / "sparse" / "config.json").read_text()))
    compare(sparse, tmp_path / "out", stock)


# a window of one key on all layers, on one of them, beside layers that keep their kind, in an encoder
ONE_KEY = {
    "LlamaForCausalLM": None, "MixtralForCausalLM": None, "Phi3ForCausalLM": None, "Qwen2ForCausalLM": "1=dense",
    "Gemma2ForCausalLM": None, "Gemma3ForCausalLM": "1=dense", "ModernBertForMaskedLM": "0=dense",
    "LlamaForSequenceClassification": None,
}  # fmt: skip


@pytest.mark.cross
@pytest.mark.parametrize("head", ONE_KEY)
@pytest.mark.parametrize("has_settings", [True, False], ids=["generation_config", "none"])
def test_a_window_of_one_key_is_decoded_alike(head, has_settings, tmp_path, caplog):
    """Transformers' growing cache of one key keeps the whole past (`[-0:]`), in every family that slides."""
    changes = {"layer_types": ["full_attention", "sliding_attention"]} if head == "ModernBertForMaskedLM" else {}
    if head == "Gemma3ForCausalLM":
        changes = {"layer_types": ["sliding_attention", "full_attention"]}
    sparse = saved(head, tmp_path / "sparse", "window(0, 0)", ONE_KEY[head], **changes)
    if not has_settings:
        (tmp_path / "sparse" / "generation_config.json").unlink(missing_ok=True)
    export(tmp_path / "sparse", tmp_path / "native", "native", progress=False)
    generates = sparse.can_generate()
    assert ("decoded wrongly with Transformers' DynamicCache" in caplog.text) == generates
    stock = next(
        dense
        for dense, made in sparse_hf.FAMILIES[sparse.config.model_type.removeprefix("sparse_")].architectures.items()
        if made == type(sparse).__name__
    )
    native = auto_class(stock.replace("Llama", "Mistral")).from_pretrained(tmp_path / "native").eval()
    ids = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            native(ids, use_cache=False).logits if generates else native(ids).logits, sparse(ids).logits
        )
    if generates:
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "disable_compile": True}
        wanted = sparse.generate(ids, **settings)
        assert torch.equal(native.generate(ids, **settings), wanted)
        assert torch.equal(native.generate(ids, use_cache=True, **settings), wanted)


@pytest.mark.parametrize(
    "head",
    [
        *("BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
        *("Gemma3ForCausalLM", "ModernBertForMaskedLM", "BartForConditionalGeneration", "T5ForConditionalGeneration"),
    ],
)
def test_dense_gives_the_family_back(head, tmp_path):
    dense = dense_model(head)
    dense.save_pretrained(tmp_path / "dense")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "window(5, 5) | first(1)", progress=False)
    export(tmp_path / "sparse", tmp_path / "out", "dense", progress=False)
    wanted, found = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "out"))
    assert found == wanted
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("dense", "out"))
    assert first == second
    compare(dense, tmp_path / "out", head)


REFUSED = [
    ("LlamaForCausalLM", "window(19, 0) | first(4)", None, {}, "layer 0: first(4) in window(19, 0) | first(4) has no native"),
    ("LlamaForCausalLM", "window(19, 0) & stride(2)", None, {}, "layer 0: stride(2) in window(19, 0) & stride(2)"),
    ("LlamaForCausalLM", "window(19, 0)", "1=dense", {}, "layer 1: window(None, None) has no native form: mistral has one"),
    ("LlamaForCausalLM", "window(19, 0)", None, {"attention_bias": True}, "attention_bias is set"),
    ("LlamaForCausalLM", "window(19, 0)", None, {"mlp_bias": True}, "mlp_bias is set"),
    ("MistralForCausalLM", "window(19, 0)", "1=window(9, 0)", {}, "layer 1: window(9, 0) has no native form"),
    ("Qwen2ForCausalLM", "window(19, 0)", "1=window(9, 0)", {}, "qwen2 has windows of one size only, and layer 0 has window(19"),
    ("Gemma3ForCausalLM", "window(19, 0)", None, {}, "layer 1: window(19, 0) has no native form: it is a full_attention layer"),
    ("ModernBertForMaskedLM", "window(9, 4)", "0=dense", {}, "slides as far to the left as to the right"),
    ("ModernBertForMaskedLM", "chunk(9)", "0=dense", {}, "layer 1: chunk(9, 0, 0) in chunk(9, 0, 0) & window(16, 16) has no"),
    ("BertForMaskedLM", "window(9, 9)", None, {}, "layer 0: window(9, 9) has no native form: bert has no sliding windows"),
    ("GPT2LMHeadModel", "per_head(window(9, 9), window(9, 0), window(9, 1), chunk(3))", None, {}, "layer 0: chunk(3, 0, 0) in per_head("),
    ("BartForConditionalGeneration", FULL, "decoder 1=window(9, 0)", {}, "decoder layer 1: window(9, 0)"),
]  # fmt: skip


@pytest.mark.parametrize(("head", "pattern", "layers", "changes", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_native_refuses_what_it_cannot_say(head, pattern, layers, changes, message, tmp_path):
    saved(head, tmp_path / "sparse", pattern, layers, **changes)
    with pytest.raises(ValueError) as caught:
        export(tmp_path / "sparse", tmp_path / "out", "native", progress=False)
    assert message in str(caught.value) and "--to dense" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["sparse"]


def test_mistakes_are_told(tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    saved("LlamaForCausalLM", tmp_path / "sparse", "window(9, 0)")
    with pytest.raises(ValueError, match="to is 'gguf'; it must be 'dense' or 'native'"):
        export(tmp_path / "sparse", tmp_path / "out", "gguf")
    with pytest.raises(ValueError, match="which is dense already; give a sparse checkpoint"):
        export(tmp_path / "dense", tmp_path / "out", "dense")
    with pytest.raises(ValueError, match="out is .* and source is"):
        export(tmp_path / "sparse", tmp_path / "sparse", "dense", overwrite=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        export(tmp_path / "sparse", tmp_path / "dense", "dense")
    export(tmp_path / "sparse", tmp_path / "dense", "native", overwrite=True, progress=False)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "mistral"


def test_what_travels_with_the_weights(tmp_path):
    saved("GPT2LMHeadModel", tmp_path / "sparse", "window(9, 0)")
    (tmp_path / "sparse" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "sparse" / "README.md").write_text("of the sparse one")
    export(tmp_path / "sparse", tmp_path / "out", "dense", progress=False)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}


def test_shards_stay_shards(tmp_path):
    sparse = sparse_hf.sparsify(dense_model("LlamaForQuestionAnswering"), "window(9, 0)").eval()
    sparse.save_pretrained(tmp_path / "sparse", max_shard_size="30KB")
    export(tmp_path / "sparse", tmp_path / "out", "native", progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    compare(sparse, tmp_path / "out", "MistralForQuestionAnswering")


@pytest.mark.parametrize(
    ("pattern", "limit", "window"),
    [
        (Window(9, 3) & Window(5, None), full(), Window(5, 3)),
        (Window(9, 3) | Window(5, 4), full(), Window(9, 4)),
        (Window(9, 3), causal(), Window(9, 0)),
        (First(4) | full(), full(), full()),
        (First(4) & Window(9, 0), full(), None),
        ((First(4) | Window(9, 0)) & Window(9, 0), full(), Window(9, 0)),
        (Window(9, 0) & (First(4) | Window(9, 0)), full(), Window(9, 0)),
        (First(4) & causal() | full(), causal(), causal()),
        (First(0) | Window(3, 3), full(), Window(3, 3)),
        (First(0), full(), None),
        (Stride(1) & Window(3, 3), full(), Window(3, 3)),
        (sparse_hf.PerHead(Window(3, 3), Window(3, 0)), causal(), Window(3, 0)),
        (sparse_hf.PerHead(Window(3, 3), Window(3, 0)), full(), None),
    ],
    ids=str,
)
def test_windows_in_other_words_are_recognised(pattern, limit, window):
    assert _window(pattern, limit) == window
    if window is not None:
        q, k = torch.arange(30)[:, None], torch.arange(30)
        for one in pattern.heads or (pattern,):
            assert torch.equal(one.allows(q, k) & limit.allows(q, k), window.allows(q, k))
