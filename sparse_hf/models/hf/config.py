"""What a sparse model's `config.json` says: one key, `sparse_attention`.

{"patterns": {"sparse": "window(255, 0) | first(4)", "dense": "window(None, None)"},
 "layers": ["sparse", "sparse", "dense"],
 "global_token_ids": []}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ...pattern import First, Marked, Pattern, Window, causal, full
from .layer_spec import as_pattern, describe_layers, named_layers
from .positions import Positions
from .remote_code import RemoteCode

logger = logging.get_logger(__name__)

KEYS = ("patterns", "layers", "global_token_ids")
# keys of a configuration that are not the dense model's
NOT_DENSE = ("model_type", "architectures", "auto_map", "transformers_version", "sparse_attention")
# the word of all patterns that speak of marked tokens
MARKED = Marked.word
# the attention implementations of a sparse model, and what stock names stand for: never silently dense
IMPLEMENTATIONS = {
    "sparse": "auto",
    "sparse_reference": "reference",
    "sparse_blockwise": "blockwise",
    "sparse_flex": "flex",
    "sparse_fa": "fa",
    "sparse_triton": "triton",
}
STOCK_NAMES = {None: "sparse", "eager": "sparse_reference", "sdpa": "sparse"}


def dense_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a `config.json`, dense or sparse, describes the dense model."""
    return {key: value for key, value in config.items() if key not in NOT_DENSE}


def check_weights(implementation: str | None) -> None:
    """Raise ValueError unless `implementation` gives attention weights."""
    if implementation != "sparse_reference":
        raise ValueError(
            f"attention weights are n x n, which attn_implementation={implementation!r} never makes; to look at a short text "
            "use attn_implementation='sparse_reference'"
        )


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
    """Adds `sparse_attention` to a configuration of Transformers; without it every layer is as dense as the parent's.

    What `sparse_attention` says is all that makes attention sparse: a sliding window of the family's own is written into it
    by `from_dense`, layer by layer, and not applied a second time.
    """

    sparse_attention: dict[str, Any] | None = None
    # is the family sparse by itself, so that its configuration implies a pattern?
    implies_pattern: ClassVar[bool] = False
    # do heads mark tokens by themselves, so that it is the model inside that adds those named by id?
    heads_mark: ClassVar[bool] = False
    # how the family knows where a token stands, and its classes by name: both written by `register_family`
    positions: ClassVar[Positions | None] = None
    remote_code: ClassVar[RemoteCode | None] = None
    # what is said to who gives marks to a model that does not ask for them
    why_no_marks: ClassVar[str] = "no pattern of this model has marked(); add `| marked()`"

    def __post_init__(self, **kwargs):
        kwargs.setdefault("attn_implementation", "sparse")
        super().__post_init__(**kwargs)
        self.validate_sparse_attention()

    def _set_attn_implementation(self, value):
        # by whatever route it is set, a sparse configuration holds an implementation that honours its pattern
        value = value if isinstance(value, dict) else own_implementation(value)
        PreTrainedConfig._attn_implementation.fset(self, value)

    _attn_implementation = property(PreTrainedConfig._attn_implementation.fget, _set_attn_implementation)

    def _set_output_attentions(self, value):
        if value:
            check_weights(self._attn_implementation)
        self._output_attentions = value

    output_attentions = property(PreTrainedConfig.output_attentions.fget, _set_output_attentions)

    def validate_output_attentions(self):
        if self.output_attentions:
            check_weights(self._attn_implementation)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: `save_pretrained` names every class in `auto_map`, and no source file is copied."""

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As Transformers', with `auto_map` and the file that it speaks of, for `trust_remote_code=True`."""
        if self.remote_code is not None:
            self.auto_map = self.remote_code.auto_map(self.architectures)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.remote_code.write(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_dense(cls, dense, pattern=None, layers=None, global_token_ids: Sequence[int] = ()):
        """The counterpart of a configuration of Transformers.

        Args:
            dense: a configuration object, or the dict of a `config.json`.
            pattern: a `Pattern` or its text, for every layer that `layers` does not name. Layers that slide over a window in
                the dense family have it cut to that window. Families that are sparse by themselves need none: without it
                each layer keeps what its configuration implies.
            layers: see `parse_layers`; encoder-decoders say "encoder" or "decoder" before the range, as in
                `"encoder 0-3=dense, decoder=window(255, 0)"`. A layer that is named gets exactly what is said.
            global_token_ids: token ids that `marked()` speaks of wherever they occur.
        """
        values = dense_values(dense if isinstance(dense, Mapping) else dense.to_dict())
        if pattern is None and not cls.implies_pattern:
            raise ValueError(f"{cls.model_type} implies no pattern; give one, like 'window(255, 0) | first(4)'")
        plain, pattern = cls(**values), None if pattern is None else as_pattern(pattern)
        named = named_layers(layers, plain.stacks)
        places = [(stack, layer) for stack, count in plain.stacks.items() for layer in range(count)]
        chosen = {place: named[place] if place in named else plain.pattern_of(*place, pattern) for place in places}
        most = chosen[places[0]] if pattern is None else pattern
        values["sparse_attention"] = describe_layers(chosen, most, global_token_ids)
        return cls(**values)

    @property
    def stacks(self) -> dict[str, int]:
        """Layers per stack: "" for most models, "encoder" and "decoder" for those that have both."""
        return {"": self.num_hidden_layers}

    def heads_of(self, stack: str) -> int:
        return self.num_attention_heads

    def own_window(self, layer: int) -> Window | None:
        """The window over which the dense family's layer slides, or None.

        `sliding_window` counts the query itself, so the farthest key is `sliding_window - 1` back.
        """
        size, types = getattr(self, "sliding_window", None), getattr(self, "layer_types", None)
        if size is None or (types is not None and types[layer] != "sliding_attention"):
            return None
        return Window(size - 1, 0)

    def implied_pattern(self, stack: str, layer: int) -> str:
        """What a layer attends to if `sparse_attention` says nothing: of a dense family everything within its own window."""
        window = self.own_window(layer)
        return str(full() if window is None else window)

    def pattern_of(self, stack: str, layer: int, pattern: Pattern | None) -> Pattern:
        """What becomes of `pattern` in a layer; None is the implied one."""
        return (
            as_pattern(self.implied_pattern(stack, layer)) if pattern is None else _cut(pattern, self.own_window(layer))
        )

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
        if not isinstance(spec["patterns"], dict):
            raise ValueError("sparse_attention.patterns must be an object (name -> pattern)")
        patterns = {name: Pattern.parse(text) for name, text in spec["patterns"].items()}
        for stack, names in _by_stack(spec["layers"], self.stacks).items():
            self._validate_stack(stack, names, patterns)
        self.sparse_attention = {**spec, "patterns": {name: str(pattern) for name, pattern in patterns.items()}}
        ids = spec.get("global_token_ids") or []
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"sparse_attention.global_token_ids is {ids}; it must be a list of token ids")
        if ids and not self.uses_marks:
            raise ValueError("sparse_attention.global_token_ids is set, but no pattern has marked(); add `| marked()`")

    def _validate_stack(self, stack: str, names: list, patterns: dict[str, Pattern]) -> None:
        where = f"sparse_attention.layers[{stack!r}]" if stack else "sparse_attention.layers"
        if len(names) != self.stacks[stack]:
            raise ValueError(f"{where} has {len(names)} entries; the model has {self.stacks[stack]} layers")
        unknown = sorted({str(name) for name in names} - set(patterns))
        if unknown:
            raise ValueError(f"{where} names {unknown}; the patterns are {sorted(patterns)}")
        for name in dict.fromkeys(names):
            check_heads(patterns[name], self.heads_of(stack), f"sparse_attention.patterns[{name!r}]")
            if stack == "decoder" and MARKED in str(patterns[name]):
                raise ValueError(
                    f"{where} uses {patterns[name]}, and marked() speaks of tokens of the encoder; give the decoder a pattern "
                    "of its own, like layers='decoder=window(255, 0)'"
                )

    def layer_pattern(self, layer: int | None, is_causal: bool = False, stack: str = "") -> str:
        """The text of a layer's pattern, cut to the past if the model is causal. Layer None: of a layer that all share."""
        layer = 0 if layer is None else layer
        spec = self.sparse_attention
        if spec is None:
            text = self.implied_pattern(stack, layer)
        else:
            names = spec["layers"][stack] if stack else spec["layers"]
            text = spec["patterns"][names[layer]]
        return _past(text) if is_causal else text

    @property
    def global_token_ids(self) -> list[int]:
        return list((self.sparse_attention or {}).get("global_token_ids") or [])

    @property
    def uses_marks(self) -> bool:
        # validation wrote the patterns in their one text form
        spec = self.sparse_attention
        return self.implies_pattern if spec is None else any(MARKED in text for text in spec["patterns"].values())


def _by_stack(layers, stacks: Mapping[str, int]) -> dict[str, list]:
    named = {"": layers} if isinstance(layers, list) else layers
    if not isinstance(named, dict) or set(named) != set(stacks) or not all(isinstance(v, list) for v in named.values()):
        wanted = "a list of names" if "" in stacks else "an object with a list of names for 'encoder' and for 'decoder'"
        raise ValueError(f"sparse_attention.layers is {layers!r}; it must be {wanted}")
    return named


def _cut(pattern: Pattern, window: Window | None) -> Pattern:
    if window is None:
        return pattern
    if pattern == full():
        return window
    if pattern.heads:
        return type(pattern)(*(_cut(p, window) for p in pattern.heads))
    return pattern & window


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def _past(text: str) -> str:
    return _cached_past(text)


@lru_cache(maxsize=256)
def _cached_past(text: str) -> str:
    pattern = Pattern.parse(text)
    if pattern.heads:
        return str(type(pattern)(*(_past_of(p) for p in pattern.heads)))
    return str(_past_of(pattern))


def _past_of(pattern: Pattern) -> Pattern:
    # what is last would change with every token, and answers with a cache would not be those without
    pattern = pattern.unending()
    return First(0) if pattern is None else pattern & causal()


def check_heads(pattern: Pattern, num_heads: int, where: str) -> None:
    if pattern.heads and len(pattern.heads) != num_heads:
        raise ValueError(f"{where}: per_head names {len(pattern.heads)} patterns; the model has {num_heads} heads")
