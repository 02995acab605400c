"""GGUF files: what their headers say and Transformers does not read arrives, or is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_hf
from sparse_hf.conversion import describe_conversion
from sparse_hf.conversion.export import export
from tests.crosses import sampled

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

WIDTH, HEADS, HEAD_DIM, HIDDEN, WORDS, CONTEXT, THETA = 32, 4, 8, 32, 64, 512, 1e6
WIDE, PAST = "window(None, None)", "window(None, 0)"
YARN, LINEAR, NONE, LONGROPE = (getattr(gguf.RopeScalingType, n) for n in ("YARN", "LINEAR", "NONE", "LONGROPE"))


def write(
    file: Path, architecture: str, *keys: tuple, layers: int = 2, tensors: dict | None = None, without=()
) -> Path:
    """A tiny file of an architecture; `keys` are methods of gguf's writer without `add_`, and their arguments."""
    writer, draw = gguf.GGUFWriter(str(file), architecture), np.random.default_rng(0)
    common = {
        "context_length": CONTEXT, "embedding_length": WIDTH, "block_count": layers, "feed_forward_length": HIDDEN,
        "head_count": HEADS, "head_count_kv": HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": THETA, "vocab_size": WORDS,
        "key_length": HEAD_DIM, "rope_dimension_count": HEAD_DIM, "tokenizer_model": "llama", "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "token_list": [f"t{i}" for i in range(WORDS)], "token_scores": [0.0] * WORDS,
        "token_types": [1] * WORDS,
    }  # fmt: skip
    if architecture == "qwen2":
        # older versions of Transformers read its tokenizer with merges alone
        words = [*common["token_list"][:-2], "t0t1", "t2t3"]
        common |= {"tokenizer_model": "gpt2", "token_list": words, "token_merges": ["t0 t1", "t2 t3"]}
    for name, *values in (*common.items(), *keys):
        getattr(writer, f"add_{name}")(*values)
    shapes = {"token_embd": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    if not architecture.startswith("gemma"):
        shapes["output"] = (WORDS, WIDTH)
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in layer_shapes(architecture).items()}
    for name, shape in shapes.items():
        if name not in without:
            writer.add_tensor(f"{name}.weight", (draw.standard_normal(shape) * 0.3).astype(np.float32))
            if architecture == "qwen2" and name.endswith(("attn_q", "attn_k", "attn_v")):
                writer.add_tensor(f"{name}.bias", np.zeros(shape[0], dtype=np.float32))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return file


def layer_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    rows = HEADS * HEAD_DIM
    shapes = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_output": (WIDTH, rows), "ffn_down": (WIDTH, HIDDEN)}
    if architecture == "phi3":
        return shapes | {"attn_qkv": (3 * rows, WIDTH), "ffn_up": (2 * HIDDEN, WIDTH)}
    shapes |= {f"attn_{name}": (rows, WIDTH) for name in "qkv"} | {f"ffn_{n}": (HIDDEN, WIDTH) for n in ("gate", "up")}
    if architecture.startswith("gemma"):
        shapes |= {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
    if architecture in ("gemma3", "qwen3"):
        shapes |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
    return shapes


def converted(file: Path, pattern: str = WIDE) -> torch.nn.Module:
    out = sparse_hf.convert(file, file.parent / "sparse", pattern, progress=False, overwrite=True)
    return AutoModelForCausalLM.from_pretrained(out).eval()


def angles(model: torch.nn.Module, kind: str = "") -> torch.Tensor:
    """By how much a pair of numbers turns from one position to the next."""
    return getattr(model.model.rotary_emb, f"{kind}_inv_freq" if kind else "inv_freq").double()


def plain_angles(theta: float = THETA) -> torch.Tensor:
    return theta ** -(torch.arange(HEAD_DIM // 2, dtype=torch.float64) * 2 / HEAD_DIM)


def yarn_angles(factor: float, original: int, fast: float = 32.0, slow: float = 1.0) -> torch.Tensor:
    """As llama.cpp turns them: by interpolation, by extrapolation, and between on a ramp over the pairs."""
    near, far = (
        HEAD_DIM * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(THETA)) for turns in (fast, slow)
    )
    low, high = max(0.0, math.floor(near)), min(HEAD_DIM - 1.0, math.ceil(far))
    ramp = 1 - ((torch.arange(HEAD_DIM // 2).double() - low) / max(0.001, high - low)).clamp(0, 1)
    return plain_angles() * ((1 - ramp) / factor + ramp)


def llama3_factors(factor: float, original: int) -> list[float]:
    """As the converter of llama.cpp writes them."""
    factors = []
    for angle in plain_angles().tolist():
        wave = 2 * math.pi / angle
        share = (original / wave - 1) / 3
        factors.append(
            1.0 if wave < original / 4 else factor if wave > original else 1 / ((1 - share) / factor + share)
        )
    return factors


SCALED = {
    "yarn": ([("rope_scaling_type", YARN), ("rope_scaling_factor", 4.0), ("rope_scaling_orig_ctx_len", 128)], yarn_angles(4, 128)),
    "yarn of the whole context": ([("rope_scaling_type", YARN), ("rope_scaling_factor", 2.0)], yarn_angles(2, CONTEXT)),
    "yarn with bands": (
        [("rope_scaling_type", YARN), ("rope_scaling_factor", 4.0), ("rope_scaling_orig_ctx_len", 256),
         ("rope_scaling_yarn_beta_fast", 16.0), ("rope_scaling_yarn_beta_slow", 2.0)], yarn_angles(4, 256, 16, 2)),
    "linear": ([("rope_scaling_type", LINEAR), ("rope_scaling_factor", 8.0)], plain_angles() / 8),
    "linear, of no type": ([("rope_scaling_factor", 8.0)], plain_angles() / 8),
    "linear, in old words": ([("float32", "{arch}.rope.scale_linear", 8.0)], plain_angles() / 8),
    "none": ([("rope_scaling_type", NONE), ("rope_scaling_factor", 8.0)], plain_angles()),
    "by one": ([("rope_scaling_type", LINEAR), ("rope_scaling_factor", 1.0)], plain_angles()),
}  # fmt: skip


@pytest.mark.cross
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("scaled", SCALED)
def test_scaled_angles_arrive(scaled, architecture, tmp_path):
    keys, wanted = SCALED[scaled]
    keys = [
        (name, *(v.format(arch=architecture) if isinstance(v, str) else v for v in values)) for name, *values in keys
    ]
    model = converted(write(tmp_path / "m.gguf", architecture, *keys))
    torch.testing.assert_close(angles(model), wanted, rtol=1e-5, atol=0)
    said = (tmp_path / "sparse" / "conversion.txt").read_text()
    kind = model.config.rope_parameters["rope_type"]
    assert ("rope_parameters" in said) == (kind != "default")
    assert kind == scaled.split()[0].rstrip(",").replace("none", "default").replace("by", "default")


def test_what_yarn_does_to_the_scores_arrives(tmp_path):
    keys = [("rope_scaling_type", YARN), ("rope_scaling_factor", 4.0), ("rope_scaling_yarn_attn_factor", 0.5)]
    model = converted(write(tmp_path / "m.gguf", "llama", *keys))
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.5 * (0.1 * math.log(4) + 1))


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192)])
def test_factors_of_llama_3_arrive(factor, original, tmp_path):
    kept = llama3_factors(factor, original)
    assert len({round(x, 3) for x in kept}) > 1
    model = converted(write(tmp_path / "m.gguf", "llama", tensors={"rope_freqs.weight": kept}))
    torch.testing.assert_close(angles(model), plain_angles() / torch.tensor(kept).double(), rtol=1e-3, atol=0)
    assert model.config.rope_parameters["rope_type"] == "llama3" and model.config.rope_parameters["factor"] == factor


def test_factors_of_longrope_arrive(tmp_path):
    long, short = [1.0, 2.0, 5.0, 9.0], [1.0, 1.1, 1.2, 1.3]
    keys = [("rope_scaling_orig_ctx_len", 128), ("rope_scaling_attn_factors", 1.19)]
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    model = converted(write(tmp_path / "m.gguf", "phi3", *keys, tensors=tensors))
    rotary = model.model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(1.19) and model.config.original_max_position_embeddings == 128
    for length, factors in ((100, short), (200, long)):
        model(torch.ones(1, length).long())
        torch.testing.assert_close(angles(model), plain_angles() / torch.tensor(factors).double(), rtol=1e-5, atol=0)


def test_of_gemma_3_only_full_layers_are_scaled(tmp_path):
    keys = [
        ("rope_scaling_type", LINEAR),
        ("rope_scaling_factor", 8.0),
        ("sliding_window", 16),
        ("rope_freq_base_swa", 5e3),
    ]
    model = converted(write(tmp_path / "m.gguf", "gemma3", *keys, layers=6))
    torch.testing.assert_close(angles(model, "full_attention"), plain_angles() / 8, rtol=1e-5, atol=0)
    torch.testing.assert_close(angles(model, "sliding_attention"), plain_angles(5e3), rtol=1e-5, atol=0)


ALL, HALF = "window(15, 0)", ["window(15, 0)", WIDE]
# architecture, keys -> what each layer of a pattern without limit becomes
WINDOWS = {
    "llama": ("llama", [("sliding_window", 16)], [ALL] * 2),
    "llama without": ("llama", [], [WIDE] * 2),
    "llama of size 0": ("llama", [("sliding_window", 0)], [WIDE] * 2),
    "phi3": ("phi3", [("sliding_window", 16)], [ALL] * 2),
    "phi3 without": ("phi3", [], [WIDE] * 2),
    "phi3, each layer": ("phi3", [("sliding_window", 16), ("sliding_window_pattern", [True, True])], [ALL] * 2),
    "gemma2": ("gemma2", [("sliding_window", 16)], HALF),
    "gemma2, each layer": ("gemma2", [("sliding_window", 16), ("sliding_window_pattern", [False, True])], HALF[::-1]),
    "gemma3": ("gemma3", [("sliding_window", 16)], [*[ALL] * 5, WIDE]),
    "gemma3, every third full": ("gemma3", [("sliding_window", 16), ("sliding_window_pattern", 3)], [ALL, ALL, WIDE] * 2),
    "gemma3, each layer": (
        "gemma3", [("sliding_window", 16), ("sliding_window_pattern", [True, False] * 3)], HALF * 3),
    "qwen2": ("qwen2", [("sliding_window", 16), ("sliding_window_pattern", [False, True])], HALF[::-1]),
    "qwen2 without": ("qwen2", [], [WIDE] * 2),
}  # fmt: skip


@pytest.mark.parametrize("case", sampled(list(WINDOWS)[::2], WINDOWS))
def test_windows_of_layers_arrive(case, tmp_path):
    architecture, keys, wanted = WINDOWS[case]
    file = write(tmp_path / "m.gguf", architecture, *keys, layers=len(wanted))
    told = describe_conversion(file, WIDE)
    ranges = [
        (entry["pattern"].removesuffix(f" & {PAST}"), entry["last"] - entry["first"] + 1) for entry in told["layers"]
    ]
    assert [pattern for pattern, count in ranges for _ in range(count)] == wanted
    model = converted(file)
    ids = torch.randint(3, WORDS, (1, 70), generator=torch.Generator().manual_seed(0))
    # the same weights with Transformers' own layers and windows, or, where no layer has one, without
    dense = AutoModelForCausalLM.from_pretrained(
        export(tmp_path / "sparse", tmp_path / "native", "native", progress=False)
    )
    dense.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        if WIDE not in wanted:
            far = ids.clone()
            far[0, 0] = (ids[0, 0] + 1) % WORDS
            # two layers of 15 tokens back each
            assert torch.equal(model(far).logits[0, -1], model(ids).logits[0, -1])


CAPPED = {
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 without": ("gemma2", {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0}),
    "gemma3": ("gemma3", {"final_logit_softcapping": 3.0}),
}


@pytest.mark.parametrize("case", CAPPED)
def test_soft_caps_arrive(case, tmp_path):
    architecture, caps = CAPPED[case]
    model = converted(write(tmp_path / "m.gguf", architecture, ("sliding_window", 16), *caps.items()))
    assert {name: getattr(model.config, name) for name in caps} == {name: cap or None for name, cap in caps.items()}
    ids = torch.randint(3, WORDS, (1, 30), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(
        export(tmp_path / "sparse", tmp_path / "native", "native", progress=False), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        found = model(ids).logits
        torch.testing.assert_close(found, dense(ids).logits, rtol=1e-4, atol=1e-4)
    limit = caps["final_logit_softcapping"]
    assert not limit or found.abs().max() < limit


REFUSED = {
    "qwen2 does not say which layers": ("qwen2", [("sliding_window", 16)], {}, "does not say which layers of qwen2"),
    "gemma3 names no window": ("gemma3", [], {}, "names no attention.sliding_window"),
    "llama of two kinds": (
        "llama", [("sliding_window", 16), ("sliding_window_pattern", 2)], {}, "mistral has one window on all 2 layers"),
    "experts": ("llama", [("expert_count", 4), ("expert_used_count", 2)], {}, "it has 4 experts, and Transformers reads llama"),
    "an unknown scaling": ("llama", [("string", "llama.rope.scaling.type", "spiral"), ("rope_scaling_factor", 2.0)], {},
                           "rope.scaling.type is 'spiral'"),
    "LongRoPE of another family": ("llama", [("rope_scaling_type", LONGROPE)], {}, "LongRoPE, which llama does not have"),
    "LongRoPE without factors": ("phi3", [("rope_scaling_type", LONGROPE)], {}, "are not both in the file"),
    "YaRN of Phi-3": ("phi3", [("rope_scaling_type", YARN), ("rope_scaling_factor", 2.0)], {}, "phi3 scales by LongRoPE alone"),
    "factors of nobody": ("llama", [], {"rope_freqs.weight": [1.0, 7.0, 3.0, 2.0]}, "as no parameters do that are known here"),
    "a cap of nobody": ("llama", [("final_logit_softcapping", 3.0)], {}, "final_logit_softcapping is 3.0, and llama has no such soft cap"),
    "a cap of Gemma 2": ("gemma3", [("sliding_window", 16), ("attn_logit_softcapping", 3.0)], {}, "gemma3_text has no such soft cap"),
    "half of yarn": ("llama", [("rope_scaling_type", YARN), ("rope_scaling_factor", 2.0), ("rope_scaling_yarn_ext_factor", 0.5)],
                     {}, "yarn_ext_factor is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused(case, tmp_path):
    architecture, keys, tensors, message = REFUSED[case]
    file = write(tmp_path / "m.gguf", architecture, *keys, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        sparse_hf.convert(file, tmp_path / "sparse", WIDE, progress=False)
    with pytest.raises(ValueError, match=message):
        describe_conversion(file, WIDE)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    file = write(tmp_path / "m.gguf", "llama", without=("blk.1.ffn_up",))
    with pytest.raises(ValueError, match="has no weights for model.layers.1.mlp.up_proj.weight of LlamaForCausalLM"):
        sparse_hf.convert(file, tmp_path / "sparse", WIDE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("begins", [True, False])
def test_texts_begin_as_the_file_says(begins, tmp_path):
    file = write(tmp_path / "m.gguf", "llama", ("add_bos_token", begins))
    if begins and not reads_how_texts_begin():
        with pytest.raises(ValueError, match=r"texts begin with a token of their own.*5\.24"):
            converted(file)
        assert not (tmp_path / "sparse").exists()
        return
    converted(file)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sparse")
    assert (tokenizer("t5")["input_ids"][:1] == [1]) == begins


def reads_how_texts_begin() -> bool:
    return Version(transformers.__version__) >= Version("5.24")


def test_the_report_says_what_was_read(tmp_path):
    keys = [("rope_scaling_type", YARN), ("rope_scaling_factor", 4.0), ("sliding_window", 16)]
    converted(write(tmp_path / "m.gguf", "llama", *keys), "window(255, 0)")
    report = json.loads((tmp_path / "sparse" / "conversion.json").read_text())
    assert report["family"] == "mistral" and report["rope_parameters"]["rope_type"] == "yarn"
    assert report["layers"][0]["pattern"] == f"window(255, 0) & window(15, 0) & {PAST}"


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_that_is_not_there_is_named_before_anything_is_read(package, tmp_path, monkeypatch):
    file, find = write(tmp_path / "m.gguf", "llama"), importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ImportError, match=f'reading GGUF files needs the package {package}: pip install "{package}>='):
        describe_conversion(file, WIDE)
