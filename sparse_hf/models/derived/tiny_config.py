"""A tiny copy of a configuration: the same model with few layers, small widths and a short vocabulary.

Fields are read by their names, of which Transformers' configurations have some hundred kinds. What a copy keeps is what
tells layers apart: of each kind of layer there is one, heads stay grouped as they are, and windows stay windows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .entry import KINDS

HEADS, HEAD_DIM, VOCABULARY, WINDOW, MOST_KINDS, MOST_LAYERS = 4, 16, 128, 8, 6, 8
# tokens that tables of positions have rows for; a prime, so that it is not taken for another size
POSITIONS = 89

LAYERS = re.compile(
    r"(?!num_feat_extract)(.*_)?"
    r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_blocks|layers|num_hidden_groups)"
)
LIMITS = re.compile(
    r"(.*_)?(max_position_embeddings|n_positions|max_(source|target|text|sequence|seq)_(positions|length)|max_seq_len"
    r"|model_max_length|n_ctx|num_position_embeddings|max_len|position_embedding_size|block_size)"
)
PERIODS = re.compile(
    r".*(_period|_interval|_every_n_layers|sliding_window_pattern|layer_group_size|_sparse_step|_layer_freq)"
)
# fields whose value means the same whatever the sizes are
SCALING = ("original_max_position_embeddings",)

# a size that grows with the head dim
_DIM, _WIDTH = "head_dim", "width"
_SMALL: tuple[tuple[str, int | str], ...] = (
    # recurrent and state-space layers: `expand` times the width is heads times their dims
    (r"(mamba_(n_heads|num_heads)|n_mamba_heads_)", 8),
    (r"(mamba_(d_state|chunk_size)|chunk_size|ssm_state_size|state_size|mamba_dt_rank|time_step_rank)", 16),
    (r"mamba_head_dim|linear_(key|value)?_?head_dim|mamba_headdim", HEAD_DIM),
    (r"(mamba_n_groups|n_groups)", 1),
    (r"(mamba_d_ssm|mamba_intermediate_size)", 2 * HEADS * HEAD_DIM),
    (r"linear_num_(key_heads|query_heads)", 2),
    (r"linear_num_(value_)?heads", HEADS),
    # latent attention
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(qk_(rope|nope)_head_dim|v_head_dim)", HEAD_DIM),
    (r".*lora_rank", 16),
    (r"index_topk", WINDOW),
    # experts
    (r"(.*_)?((num|n)(_local|_routed)?_experts|num_moe_experts)", 4),
    (r"(.*_)?((num_)?experts_per_tok(en)?|num_selected_experts|topk|moe_k|top_k_experts|moe_top_?k)", 2),
    (r"(n_group|topk_group|num_expert_group|topk_groups?|n_shared_experts|first_k_dense_replace)", 1),
    # heads and widths
    (r"(.*_)?(head_dim|kv_channels|d_kv|head_size)", _DIM),
    (r"(rotary_dim)", HEAD_DIM // 2),
    (r"(.*_)?((num_)?(attention_|self_attention_|cross_attention_)?heads?|n_heads?|num_heads)", HEADS),
    (r"(hidden_size_per_layer_input|rel_extent|d_rel|position_buckets)", 16),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|dim|width|intermediate_size|ffn_dim|d_ff|mlp_dim"
        r"|ffn_hidden_size|n_inner|intermediate_dim|ffn_size|hidden_channels|projection_dim|projection_size|inner_dim"
        r"|output_size|proj_size)",
        _WIDTH,
    ),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"(.*_)?(sliding_window(_size)?|local_attention|attention_chunk_size|local_window_size)", WINDOW),
    (r"num_frames", 4),
    # which the layers of a codec of sounds double again and again
    (r"num_filters", 8),
)
SMALL = tuple((re.compile(name), most) for name, most in _SMALL)
KEY_HEADS = re.compile(r"(.*_)?(key_value_heads|kv_heads|n_head_kv|multi_query_group_num)")
IDS = re.compile(r"(.*_)?(token_id|token_index|token_ids|token)")


@dataclass(frozen=True)
class Sizes:
    """Of a tiny copy: heads of this dim, and as wide as all of them together."""

    head_dim: int = HEAD_DIM

    @property
    def width(self) -> int:
        return HEADS * self.head_dim

    def most(self, size: int | str) -> int:
        return getattr(self, size) if isinstance(size, str) else size


SMALLEST = Sizes()
# fields of a saved configuration that are not of its sizes
LEFT_OUT = (
    "model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "quantization_config",
    "stage_names", "out_features", "out_indices", "_out_features", "_out_indices",
)  # fmt: skip


def tiny_config(
    config: PreTrainedConfig, sizes: Sizes = SMALLEST, changes: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """A tiny configuration of the same class.

    Args:
        config: of any class of Transformers; it stays as it is.
        changes: fields that the copy has as they are given here.

    Raises:
        ValueError: the class takes no such small sizes.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT}
    # some kinds of layers are told by what is computed of fields
    kinds = {name: getattr(config, name, None) for name in KINDS}
    return type(config)(**{**_shrunk(values, config.attribute_map or {}, sizes, kinds), **(changes or {})})


def head_dim_of(config: Any) -> int | None:
    """The head dim of a configuration, by its field or by its width; None where neither says it."""
    # of layers that differ in it, the configuration says none
    varies = any("head_dim" in of for of in (config.to_dict().get("per_layer_config") or {}).values())
    found = None if varies else getattr(config, "head_dim", None)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(found, int) or not isinstance(width, int) or not isinstance(heads, int):
        return found if isinstance(found, int) else None
    return width // heads


def _shrunk(
    values: dict[str, Any], alias: Mapping[str, str], sizes: Sizes, kinds: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    count = values.get(alias.get("num_hidden_layers", "num_hidden_layers"))
    if not isinstance(count, int):
        # as long as the list of their kinds
        count = next((len(v) for name in KINDS if isinstance(v := values.get(name), list)), None)
    told = [v for v in {**values, **(kinds or {})}.values() if _tells(v, count)]
    kept = _kept_layers(told, count) if isinstance(count, int) else [0, 1]
    old = {name: values.get(alias.get(name, name)) for name in ("hidden_size", "num_attention_heads", "head_dim")}
    shrink = _Shrink(values, old, kept, count, sizes, bool(told))
    made = {name: shrink(name, value) for name, value in values.items()}
    _fit_ids(made)
    _fit_rope(made, old, values, sizes)
    return made


def _kept_layers(told: list[Any], count: int) -> list[int]:
    """The layers that stay, by lists that tell their kinds: the first ones, if all kinds are among them, else one of each."""
    kinds: dict[tuple, int] = {}
    for layer in range(count):
        kinds.setdefault(tuple(str(v[layer]) for v in told), layer)
    first = max(*kinds.values(), 1) + 1
    if first <= MOST_LAYERS:
        return list(range(min(first, count)))
    kept = sorted(kinds.values())[:MOST_KINDS]
    others = [layer for layer in range(count) if layer not in kept]
    return sorted(kept + others[: max(2 - len(kept), 0)])


def _tells(listed: Any, count: Any) -> bool:
    """Is this a list with an entry for each layer, which tells a few kinds apart?"""
    if not isinstance(listed, (list, tuple, str)) or len(listed) != count:
        return False
    return all(isinstance(v, (str, bool, int)) for v in listed) and len(set(listed)) <= MOST_KINDS


@dataclass(frozen=True)
class _Shrink:
    """What becomes of a field."""

    values: dict[str, Any]
    old: dict[str, Any]
    kept: list[int]
    count: Any
    sizes: Sizes
    are_told: bool

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self.inside(name, value)
        if isinstance(value, (list, tuple, str)):
            return _small_list(name, value, self.kept, self.count)
        if value is None and name in ("head_dim", "num_key_value_heads"):
            return self.sizes.head_dim if name == "head_dim" else HEADS
        return value if isinstance(value, bool) or not isinstance(value, int) else self.number(name, value)

    @property
    def latent_head_dim(self) -> int | None:
        """The head dim of latent attention: a part with rotary positions and one without."""
        parts = self.values.get("qk_rope_head_dim"), self.values.get("qk_nope_head_dim")
        return sum(p for p in parts if p) if all(isinstance(p, int) for p in parts) else None

    def inside(self, name: str, value: dict[Any, Any]) -> dict[Any, Any]:
        if name == "per_layer_config":
            of_layer = {int(layer): of for layer, of in value.items()}
            return {
                i: {key: self(key, number) for key, number in of_layer[layer].items()}
                for i, layer in enumerate(self.kept)
                if layer in of_layer
            }
        if {"hidden_size", "num_hidden_layers", "model_type"} & set(value):
            return _shrunk({k: v for k, v in value.items() if k not in LEFT_OUT[1:]}, {}, self.sizes)
        return value

    def number(self, name: str, value: int) -> int:
        if LAYERS.fullmatch(name):
            return min(value, len(self.kept))
        if PERIODS.fullmatch(name):
            return value if self.are_told else min(value, 2)
        if name.endswith("_layer_offset"):
            return value if self.are_told else min(value, 1)
        if LIMITS.fullmatch(name):
            return value if value <= POSITIONS or any(scaled in self.values for scaled in SCALING) else POSITIONS
        if KEY_HEADS.fullmatch(name):
            return min(value, HEADS if value == self.old["num_attention_heads"] else 2)
        if name == "mamba_d_head":
            # heads times this is another field
            return HEAD_DIM
        if name == "head_dim" and value == self.latent_head_dim:
            return 2 * HEAD_DIM
        if name in ("image_size", "input_size") and isinstance(self.values.get("patch_size"), int):
            return min(value, 8 * self.values["patch_size"])
        for pattern, most in SMALL:
            if pattern.fullmatch(name):
                return min(value, self.sizes.most(most))
        width = self.old["hidden_size"]
        if isinstance(width, int) and width > self.sizes.width and value and value % width == 0 and value // width <= 4:
            return value // width * self.sizes.width
        return value


def _small_list(name: str, value: Any, kept: list[int], count: Any) -> Any:
    if isinstance(value, str):
        return "".join(value[i] for i in kept) if len(value) == count and name.endswith("pattern") else value
    kind = type(value)
    if len(value) == count and count != len(kept):
        return kind(value[i] for i in kept)
    numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not numbers:
        return value
    if re.search(r"layer|indic|index|idx|block", name) and isinstance(count, int) and len(value) != count:
        return kind(kept.index(v) for v in value if v in kept)
    if name == "image_size":
        return kind(min(v, 64) for v in value)
    if re.search(r"dim|size|width|channels", name) and "patch" not in name and "kernel" not in name:
        return kind(min(v, 32) for v in value)
    return value


def _fit_ids(values: dict[str, Any]) -> None:
    """Have the ids of special tokens be in the vocabulary, each another one."""
    size = values.get("vocab_size")
    if not isinstance(size, int):
        return
    free = iter(range(size - 1, 0, -1))
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, value in values.items():
        if not IDS.fullmatch(name):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value >= size:
            values[name] = fixed.get(name) or next(free)
        elif isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            values[name] = [v if v < size else next(free) for v in value]


def _fit_rope(values: dict[str, Any], old: Mapping[str, Any], before: Mapping[str, Any], sizes: Sizes) -> None:
    """Have lists with an entry for each pair of rotary dims be as long as the new dims."""
    heads, width = old.get("num_attention_heads"), old.get("hidden_size")
    was = before.get("qk_rope_head_dim") or old.get("head_dim")
    if not isinstance(was, int) and isinstance(heads, int) and isinstance(width, int):
        was = width // heads
    if not isinstance(was, int) or was <= (now := sizes.head_dim):
        return

    def fitted(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: fitted(v, k) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and key in ("long_factor", "short_factor"):
            return list(value)[: max(len(value) * now // was, 1)]
        if isinstance(value, (list, tuple)) and key.endswith("mrope_section"):
            return _section(list(value), sum(value) * now // was)
        return value

    for name in ("rope_parameters", "rope_scaling", "mrope_section"):
        if name in values:
            values[name] = fitted(values[name], name)


def _section(section: list[int], total: int) -> list[int]:
    """The shares of a section, of another total."""
    whole = sum(section)
    made = [max(part * total // whole, 0) for part in section]
    made[-1] += total - sum(made)
    return made
