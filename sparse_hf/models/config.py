"""What a sparse model's `config.json` says: one key, `sparse_attention`.

{"patterns": {"sparse": "window(255, 0) | first(4)", "dense": "window(None, None)"},
 "layers": ["sparse", "sparse", "dense"],
 "global_token_ids": []}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..pattern import Marked, Pattern, causal, full

logger = logging.get_logger(__name__)

KEYS = ("patterns", "layers", "global_token_ids")
DENSE = "dense"
MARKED = str(Marked())
# the attention implementations of a sparse model, and what stock names stand for: never silently dense
IMPLEMENTATIONS = {
    "sparse": "auto",
    "sparse_reference": "reference",
    "sparse_blockwise": "blockwise",
    "sparse_flex": "flex",
}
STOCK_NAMES = {None: "sparse", "eager": "sparse_reference", "sdpa": "sparse"}


def own_implementation(name: str | None) -> str:
    """The sparse implementation that `attn_implementation=name` stands for.

    Raises:
        ValueError: a name that would make the model dense (flash, flex_attention) or is unknown.
    """
    if name in IMPLEMENTATIONS:
        return name
    if name in STOCK_NAMES:
        if name is not None:
            logger.warning_once(
                f"attn_implementation={name!r} on a sparse model means {STOCK_NAMES[name]!r}: its pattern still holds."
            )
        return STOCK_NAMES[name]
    raise ValueError(
        f"attn_implementation={name!r} would ignore the sparse pattern; the sparse ones are {', '.join(IMPLEMENTATIONS)}"
    )


@dataclass(kw_only=True)
class SparseConfigMixin:
    """Adds `sparse_attention` to a configuration of Transformers; without it every layer is dense."""

    sparse_attention: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("attn_implementation", "sparse")
        super().__post_init__(**kwargs)
        self.validate_sparse_attention()

    def _set_attn_implementation(self, value):
        # by whatever route it is set, a sparse configuration holds an implementation that honours its pattern
        value = value if isinstance(value, dict) else own_implementation(value)
        PreTrainedConfig._attn_implementation.fset(self, value)

    _attn_implementation = property(PreTrainedConfig._attn_implementation.fget, _set_attn_implementation)

    @classmethod
    def from_dense(cls, dense, pattern, layers=None, global_token_ids: Sequence[int] = ()):
        """The sparse counterpart of a dense configuration.

        Args:
            dense: a configuration object, or the dict of a `config.json`.
            pattern: a `Pattern` or its text, for every layer that `layers` does not name.
            layers: see `parse_layers`.
            global_token_ids: token ids that `marked()` speaks of wherever they occur.
        """
        values = dict(dense if isinstance(dense, Mapping) else dense.to_dict())
        num_layers = values.get("num_hidden_layers") or cls().num_hidden_layers
        for key in ("model_type", "architectures", "auto_map", "transformers_version", "sparse_attention"):
            values.pop(key, None)
        values["sparse_attention"] = describe_layers(
            parse_layers(layers, num_layers, pattern), pattern, global_token_ids
        )
        return cls(**values)

    def validate_sparse_attention(self) -> None:
        """Raise ValueError with the remedy if `sparse_attention` does not fit this configuration."""
        spec = self.sparse_attention
        if spec is None:
            return
        if not isinstance(spec, dict) or set(spec) - set(KEYS) or not {"patterns", "layers"} <= set(spec):
            found = list(spec) if isinstance(spec, dict) else spec
            raise ValueError(
                f"sparse_attention holds {found}; it needs the keys 'patterns' and 'layers' and may have 'global_token_ids'. "
                "A newer sparse_hf may have written it"
            )
        patterns, layers = spec["patterns"], spec["layers"]
        if not isinstance(patterns, dict) or not isinstance(layers, list):
            raise ValueError(
                "sparse_attention.patterns must be an object (name -> pattern) and .layers a list of names"
            )
        if len(layers) != self.num_hidden_layers:
            raise ValueError(
                f"sparse_attention.layers has {len(layers)} entries; the model has {self.num_hidden_layers} layers"
            )
        unknown = sorted({str(name) for name in layers} - set(patterns))
        if unknown:
            raise ValueError(f"sparse_attention.layers names {unknown}; the patterns are {sorted(patterns)}")
        parsed = {name: Pattern.parse(text) for name, text in patterns.items()}
        for name, pattern in parsed.items():
            check_heads(pattern, self.num_attention_heads, f"sparse_attention.patterns[{name!r}]")
        self.sparse_attention = {**spec, "patterns": {name: str(pattern) for name, pattern in parsed.items()}}
        ids = spec.get("global_token_ids") or []
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"sparse_attention.global_token_ids is {ids}; it must be a list of token ids")
        if ids and not self.uses_marks:
            raise ValueError("sparse_attention.global_token_ids is set, but no pattern has marked(); add `| marked()`")

    def layer_pattern(self, layer: int, is_causal: bool = False) -> str:
        """The text of a layer's pattern, cut to the past if the model is causal."""
        spec = self.sparse_attention
        text = str(full()) if spec is None else spec["patterns"][spec["layers"][layer]]
        return _past(text) if is_causal else text

    @property
    def global_token_ids(self) -> list[int]:
        return list((self.sparse_attention or {}).get("global_token_ids") or [])

    @property
    def uses_marks(self) -> bool:
        # validation wrote the patterns in their one text form
        return any(MARKED in text for text in (self.sparse_attention or {}).get("patterns", {}).values())


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def _past(text: str) -> str:
    return _cached_past(text)


@lru_cache(maxsize=256)
def _cached_past(text: str) -> str:
    pattern = Pattern.parse(text)
    if pattern.heads:
        return str(type(pattern)(*(p & causal() for p in pattern.heads)))
    return str(pattern & causal())


def check_heads(pattern: Pattern, num_heads: int, where: str) -> None:
    if pattern.heads and len(pattern.heads) != num_heads:
        raise ValueError(f"{where}: per_head names {len(pattern.heads)} patterns; the model has {num_heads} heads")


def describe_layers(layers: Sequence[Pattern], pattern, global_token_ids: Sequence[int] = ()) -> dict[str, Any]:
    """The value of `sparse_attention` for these layers, with a name for each distinct pattern."""
    main, names = _pattern(pattern), {}
    for p in layers:
        if p not in names:
            names[p] = "sparse" if p == main else DENSE if p == full() else f"pattern_{len(names)}"
    return {
        "patterns": {name: str(p) for p, name in names.items()},
        "layers": [names[p] for p in layers],
        "global_token_ids": list(global_token_ids),
    }


def parse_layers(layers, num_layers: int, pattern) -> list[Pattern]:
    """One pattern per layer.

    Args:
        layers: None (the same everywhere); a text like `"0-3=dense, 8=window(64, 0), 20-=dense"` with inclusive ranges,
            where `dense` is full attention and layers that are not named take `pattern`; a dict from such a range or a
            layer number to a pattern; or a sequence with one pattern per layer.
        num_layers: layers of the model.
        pattern: a `Pattern` or its text.

    Raises:
        ValueError: a range outside the model, a layer named twice, or a wrong number of patterns.
    """
    pattern = _pattern(pattern)
    if layers is None:
        return [pattern] * num_layers
    if isinstance(layers, str):
        layers = dict(_split_spec(layers))
    if not isinstance(layers, Mapping):
        layers = list(layers)
        if len(layers) != num_layers:
            raise ValueError(f"layers has {len(layers)} patterns; the model has {num_layers} layers")
        return [_pattern(p) for p in layers]
    chosen: dict[int, Pattern] = {}
    for where, what in layers.items():
        for layer in _layer_range(where, num_layers):
            if layer in chosen:
                raise ValueError(f"layers names layer {layer} twice")
            chosen[layer] = _pattern(what)
    return [chosen.get(layer, pattern) for layer in range(num_layers)]


def _split_spec(text: str):
    # commas also stand inside patterns, so an entry ends where the next `range=` begins
    entries = re.split(r",\s*(?=\d+\s*(?:-\s*\d*)?\s*=)", text.strip())
    for entry in entries:
        where, equals, what = entry.partition("=")
        if not equals or not what.strip():
            raise ValueError(
                f"layers: cannot read {entry.strip()!r}; write RANGE=PATTERN, like '0-3=dense, 8=window(64, 0)'"
            )
        yield where.strip(), what.strip()


def _layer_range(where, num_layers: int) -> range:
    match = re.fullmatch(r"\s*(\d+)\s*(-)?\s*(\d*)\s*", str(where))
    if not match:
        raise ValueError(f"layers: {where!r} is not a layer or a range; write 8, 0-3 or 20-")
    first = int(match[1])
    last = first if not match[2] else int(match[3]) if match[3] else num_layers - 1
    if first > last or last >= num_layers:
        raise ValueError(f"layers: {where!r} is outside the model, which has layers 0-{num_layers - 1}")
    return range(first, last + 1)


def _pattern(what) -> Pattern:
    if isinstance(what, Pattern):
        return what
    return full() if what == DENSE else Pattern.parse(what)
