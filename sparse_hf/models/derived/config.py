"""Configurations of derived families: stacks, heads and kinds of layers, read off fields by the names that they have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ...pattern import Pattern
from ...pattern.like import PatternLike
from ..hf.config import SparseConfigMixin, dense_values
from ..hf.layer_spec import LayersLike, named_layers
from .entry import KINDS, LAYERS
from .own_masks import OwnMasks, kind_of

# what configurations call the number of heads, and that of layers and heads of two stacks
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads", "heads")
SIDES = {
    "encoder": (("encoder_layers", "num_encoder_layers", "num_layers"), ("encoder_attention_heads", "num_heads")),
    "decoder": (("decoder_layers", "num_decoder_layers"), ("decoder_attention_heads", "num_heads")),
}
# kinds of layers that have no attention over pairs of tokens
OF_ANOTHER_KIND = re.compile(
    r"mamba.*|.*linear.*|.*conv.*|recurrent|.*ssm.*|.*lru.*|.*delta.*|lightning.*|mlp|moe|.*lstm.*|rwkv.*|kda|feed_?forward"
)


class DerivedConfigMixin(SparseConfigMixin):
    """Of one stack of layers, some of which may be of another kind than attention; these stay what they are."""

    # raises for a dense configuration whose tiny copy is not what the dense class is; written by `derive`
    check_dense: ClassVar[Callable[[PreTrainedConfig], None] | None] = None

    # which window or chunk each kind of layers has of its own; written by `derive`
    own_masks: ClassVar[OwnMasks] = {}

    @property
    def stacks(self) -> dict[str, int]:
        return {"": _first(self, LAYERS)}

    def heads_of(self, stack: str) -> int:
        return _first(self, HEADS)

    def own_window(self, layer: int) -> Pattern | None:
        kind = kind_of(self, layer)
        if kind not in self.own_masks:
            return super().own_window(layer)
        own = self.own_masks[kind]
        # layers of one kind may have windows of several sizes
        return None if own is None else own.pattern(self.per_layer_config[layer] if _varies(self) else self)

    @property
    def attention_layers(self) -> list[int] | None:
        """The layers that have attention over pairs of tokens; None if the configuration tells no kinds apart."""
        count = self.stacks.get("")
        kinds = next((k for name in KINDS if (k := _kinds(self, name, count)) is not None), None)
        if kinds is None:
            return None
        return [layer for layer, kind in enumerate(kinds) if not OF_ANOTHER_KIND.fullmatch(kind)]

    def describe(
        self, pattern: PatternLike | None = None, layers: LayersLike = None, global_token_ids: Sequence[int] = ()
    ) -> dict[str, Any]:
        attending = self.attention_layers
        if attending is not None:
            _refuse_other_kinds(self, attending, layers)
        spec = super().describe(pattern, layers, global_token_ids)
        if self.check_dense is not None:
            self.check_dense(type(self).__bases__[1](**dense_values(self.to_dict())))
        return spec


class DerivedEncoderDecoderConfigMixin(DerivedConfigMixin):
    """`sparse_attention.layers` is `{"encoder": [...], "decoder": [...]}`; cross-attention stays dense."""

    @property
    def stacks(self) -> dict[str, int]:
        return {stack: _first(self, names) for stack, (names, _) in SIDES.items()}

    def heads_of(self, stack: str) -> int:
        return _first(self, (*SIDES[stack][1], *HEADS))


def _varies(config: Any) -> bool:
    """Do layers have values of their own, which the configuration then refuses to tell of all?"""
    return getattr(config, "is_heterogeneous", False)


def _refuse_other_kinds(config: DerivedConfigMixin, attending: list[int], layers: LayersLike) -> None:
    if not attending:
        raise ValueError(f"{config.model_type} has no attention layer, so that no pattern can hold in it")
    if layers is None or not isinstance(layers, (str, dict)):
        return
    others = [layer for _, layer in named_layers(layers, config.stacks) if layer not in attending]
    if others:
        raise ValueError(
            f"layers names layer {others[0]}, which is of another kind than attention and stays what it is; the attention layers of "
            f"this {config.model_type} model are {', '.join(map(str, attending))}"
        )


def _kinds(config: Any, name: str, count: int | None) -> list[str] | None:
    # some are properties, and some of these raise where the fields that they read are not set
    found = getattr(config, name, None)
    if not isinstance(found, (list, tuple)) or len(found) != count or not all(isinstance(k, str) for k in found):
        return None
    return list(found)


def field_of(config: Any, names: Sequence[str]) -> str | None:
    """The first of these names under which a configuration has a whole number."""
    alias = config.attribute_map or {}
    for name in names:
        value = vars(config).get(alias.get(name, name))
        if isinstance(value, int) and not isinstance(value, bool):
            return name
    return None


def _first(config: Any, names: Sequence[str]) -> int:
    name = field_of(config, names)
    # some compute it of other fields
    found = getattr(config, names[0] if name is None else name, None)
    if not isinstance(found, int):
        raise ValueError(f"{config.model_type} says nowhere how many there are of what its {names[0]} would be")
    return found
