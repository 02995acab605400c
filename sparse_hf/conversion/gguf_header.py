"""What the header of a GGUF file says and Transformers does not read: scaled angles, windows of layers, and soft caps.

Names of keys and what they mean are those of the format (ggml's docs/gguf.md) and of llama.cpp, which writes and runs such
files. What cannot be said in a configuration of Transformers is refused: a model that is wrong on long texts is worth less
than an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..models.hf.register import family_of
from .windows import BY_LAYER, FULL, SLIDING, TYPED, UNIFORM, mistral_values, size_values

INSTEAD = "convert the checkpoint that the file was made from"
# tensors of factors by which angles are divided: Llama 3's, and the two of LongRoPE
LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# of Llama 3's scaling, a file keeps the factors that follow from these, which are tried
LLAMA3_BANDS, LLAMA3_LENGTHS = ((1.0, 4.0),), (8192, 2048, 4096, 16384, 32768)
# soft caps of scores and of logits -> families that compute them, under the same name in their configurations
CAPS = {"attn_logit_softcapping": ("gemma2",), "final_logit_softcapping": ("gemma2", "gemma3_text")}


@dataclass(frozen=True)
class Header:
    """Keys of a GGUF file without the name of its architecture in front, and its tensors of rotary factors by name."""

    file: str
    keys: Mapping[str, Any]
    factors: Mapping[str, Sequence[float]]

    def get(self, key: str, otherwise: Any = None) -> Any:
        value = self.keys.get(key)
        return otherwise if value is None else value

    def refusal(self, why: str) -> ValueError:
        return ValueError(f"{self.file}: {why}; {INSTEAD}")


def read_header(file: Path) -> Header:
    """The keys below the file's architecture."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    prefix = f"{reader.fields['general.architecture'].contents()}."
    keys = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    factors = {t.name: t.data.reshape(-1).tolist() for t in reader.tensors if t.name in (LLAMA3, LONG, SHORT)}
    return Header(file.name, keys, factors)


def begins_texts(file: Path) -> bool:
    """Does a file say that its tokenizer puts a token before each text?"""
    import gguf

    said = gguf.GGUFReader(str(file)).fields.get("tokenizer.ggml.add_bos_token")
    return said is not None and bool(said.contents())


def complete(config: dict[str, Any], header: Header) -> dict[str, Any]:
    """The configuration that Transformers read, with what it left out.

    Raises:
        ValueError: the file says what no configuration of its family can say.
    """
    if header.get("expert_count", 0) and not any("expert" in key for key in config):
        raise header.refusal(
            f"it has {header.get('expert_count')} experts, and Transformers reads {config['model_type']}"
        )
    if config.get("rope_parameters"):
        config = _scaled(config, header)
    return _sliding(_capped(config, header), header)


def _capped(config: dict[str, Any], header: Header) -> dict[str, Any]:
    for name, families in CAPS.items():
        if name in header.keys and config["model_type"] in families:
            # 0 is none
            config = {**config, name: header.get(name) or None}
        elif header.get(name, 0.0):
            raise header.refusal(f"{name} is {header.get(name)}, and {config['model_type']} has no such soft cap")
    return config


def _scaled(config: dict[str, Any], header: Header) -> dict[str, Any]:
    parameters = config["rope_parameters"]
    # of Gemma 3 only full layers are scaled; those that slide may turn at a speed of their own
    typed = FULL in parameters
    base = parameters[FULL] if typed else parameters
    scaling = _scaling(config, header, base)
    if typed:
        local = {
            **parameters[SLIDING],
            "rope_theta": header.get("rope.freq_base_swa", parameters[SLIDING]["rope_theta"]),
        }
        return {**config, "rope_parameters": {**parameters, FULL: {**base, **scaling}, SLIDING: local}}
    if "rope.freq_base_swa" in header.keys and header.get("rope.freq_base_swa") != base["rope_theta"]:
        raise header.refusal(
            f"rope.freq_base_swa is {header.get('rope.freq_base_swa')}, a speed that only its sliding layers have"
        )
    original = scaling.get("original_max_position_embeddings")
    if original is not None and "original_max_position_embeddings" in config:
        config = {**config, "original_max_position_embeddings": original}
    return {**config, "rope_parameters": {**base, **scaling}}


def _scaling(config: dict[str, Any], header: Header, base: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` needs beside the base: nothing where angles are not scaled."""
    kind = header.get("rope.scaling.type")
    factor = float(header.get("rope.scaling.factor", 0) or header.get("rope.scale_linear", 0) or 0)
    original = header.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if LONG in header.factors or SHORT in header.factors or kind == "longrope":
        return _longrope(config, header, original)
    if LLAMA3 in header.factors and any(abs(x - 1) > 1e-6 for x in header.factors[LLAMA3]):
        return _llama3(config, header, base)
    # llama.cpp takes a factor without a type for linear
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if config["model_type"] == "phi3":
        raise header.refusal(f"rope.scaling.type is {kind or 'linear'!r}, and phi3 scales by LongRoPE alone")
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        values = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        stretch = header.get("rope.scaling.attn_factor", 1.0) * header.get("rope.scaling.yarn_attn_factor", 1.0)
        if stretch != 1.0:
            values["attention_factor"] = stretch * (0.1 * math.log(factor) + 1.0)
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in header.keys:
                values[name] = header.get(f"rope.scaling.yarn_{name}")
        for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier"):
            if header.get(key, 0.0) not in (0.0, 1.0 if key.endswith("ext_factor") else 0.0):
                raise header.refusal(f"{key} is {header.get(key)}, which no configuration says")
        return values
    raise header.refusal(f"rope.scaling.type is {kind!r}, which is not known here")


def _longrope(config: dict[str, Any], header: Header, original: int) -> dict[str, Any]:
    if config["model_type"] != "phi3":
        raise header.refusal(f"angles are scaled by LongRoPE, which {config['model_type']} does not have")
    if LONG not in header.factors or SHORT not in header.factors:
        raise header.refusal(f"angles are scaled by LongRoPE, and {LONG} and {SHORT} are not both in the file")
    values = {
        "rope_type": "longrope",
        "long_factor": list(header.factors[LONG]),
        "short_factor": list(header.factors[SHORT]),
        "original_max_position_embeddings": original,
    }
    if "rope.scaling.attn_factor" in header.keys:
        values["attention_factor"] = header.get("rope.scaling.attn_factor")
    return values


def _llama3(config: dict[str, Any], header: Header, base: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, of which the file keeps the outcome: one factor for each angle."""
    kept = header.factors[LLAMA3]
    factor = round(max(kept), 4)
    for (low, high), original in product(LLAMA3_BANDS, LLAMA3_LENGTHS):
        values = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        wanted = _llama3_factors(values, base["rope_theta"], len(kept))
        if all(math.isclose(one, two, rel_tol=1e-3) for one, two in zip(kept, wanted, strict=True)):
            return values
    raise header.refusal(f"{LLAMA3} scales angles as no parameters do that are known here")


def _llama3_factors(values: Mapping[str, Any], theta: float, count: int) -> list[float]:
    """By what each angle is divided: long waves by `factor`, short ones not, and those between by something between."""
    factors = []
    for i in range(count):
        turns = values["original_max_position_embeddings"] * theta ** (-i / count) / (2 * math.pi)
        share = (turns - values["low_freq_factor"]) / (values["high_freq_factor"] - values["low_freq_factor"])
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / ((1 - share) / values["factor"] + share))
    return factors


def _sliding(config: dict[str, Any], header: Header) -> dict[str, Any]:
    """The windows of layers, which the file names by a size and, in newer files, by which layers have it."""
    kind, layers = config["model_type"], int(config.get("num_hidden_layers") or 0)
    size = header.get("attention.sliding_window", 0) or None
    if size is None:
        if kind == "gemma3_text":
            raise header.refusal("it names no attention.sliding_window, which layers of Gemma 3 need")
        # Mistral's default is a window, which this file does not have
        return {**config, "sliding_window": None} if kind == "mistral" else config
    if kind == "llama":
        config, kind = (
            {**mistral_values(config), "model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "mistral",
        )
    if kind not in (*UNIFORM, *BY_LAYER, *TYPED):
        raise header.refusal(f"attention.sliding_window is {size}, and {kind} has no sliding windows")
    kinds = _kinds(header.get("attention.sliding_window_pattern"), layers)
    if kinds is None:
        if kind.startswith("qwen"):
            raise header.refusal(
                f"attention.sliding_window is {size}, and it does not say which layers of {kind} have it"
            )
        kinds = [SLIDING] * layers if kind in UNIFORM else config["layer_types"]
    if len(kinds) != layers or (kind in UNIFORM and FULL in kinds):
        raise header.refusal(
            f"attention.sliding_window_pattern is {kinds}, and {kind} has one window on all {layers} layers"
        )
    plain = family_of(kind).config_class(**{k: v for k, v in config.items() if k != "model_type"})
    return {**config, **size_values(plain, size, None if kind in UNIFORM else kinds)}


def _kinds(pattern: int | Sequence[bool] | None, layers: int) -> list[str] | None:
    """A number n: every n-th layer is full. A list: which layers slide."""
    if pattern is None:
        return None
    if isinstance(pattern, int):
        slides = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(layers)]
    else:
        slides = [bool(slide) for slide in pattern]
    return [SLIDING if slide else FULL for slide in slides]
