"""The sparse classes of a family that is no entry of the table, made from what Transformers' own classes say."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib import import_module
from types import new_class
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from ..hf.model_mixin import SparseEncoderMixin
from ..hf.register import Family, modeling_module, register_family
from .attention_modules import number_attention
from .check import check_once
from .config import SIDES, DerivedConfigMixin, DerivedEncoderDecoderConfigMixin, field_of
from .distance_bias import biased_parts
from .entry import DerivedFamily, dense_config_class
from .own_masks import OVERLAYS, OwnMasks, find_own_masks
from .positions import UNKNOWN, FoundPositions, find_positions
from .tiny_model import FAILURES, apart, tiny_with_inputs

# class attributes of every head
OF_HEADS = {"number_layers": number_attention}


def derive(entry: DerivedFamily) -> Family:
    """Make the classes of a family and register them. They become attributes of `entry.module`."""
    dense_config = dense_config_class(entry.dense_type)
    module = import_module(entry.module)
    has_two = _has_two_stacks(dense_config)
    mixin = DerivedEncoderDecoderConfigMixin if has_two else DerivedConfigMixin
    content: dict[str, Any] = {
        "__module__": entry.module,
        "__doc__": f"[`{dense_config.__name__}`] with a pattern for each layer.",
        "model_type": entry.sparse_type,
    }
    config_class: Any = new_class(
        f"Sparse{dense_config.__name__}", (mixin, dense_config), exec_body=lambda body: body.update(content)
    )
    setattr(module, config_class.__name__, config_class)
    heads = _other_heads(dense_config)
    parts = biased_parts(modeling_module(dense_config), entry.module)
    for made in parts.values():
        setattr(module, made.__name__, made)
    if has_two:
        for dense in [head for head in heads if head.__name__.endswith("Encoder")]:
            heads.remove(dense)
            made = new_class(
                f"Sparse{dense.__name__}",
                (SparseEncoderMixin, dense),
                exec_body=lambda body: body.update(__module__=entry.module, __annotations__={"config": config_class}),
            )
            setattr(module, made.__name__, made)
            parts[dense] = made
        heads = [head for head in heads if hasattr(transformers, head.__name__)]
    main = main_class(dense_config, heads)
    found = UNKNOWN if main is None else find_positions(main, dense_config())
    family = register_family(config_class, found, parts=parts, heads=heads, of_heads=OF_HEADS, verified=False)
    if main is not None:
        config_class.positions = FoundPositions(main, found)
        config_class.own_masks = _own_masks(main, dense_config())
        config_class.own_mask_functions = frozenset(OVERLAYS) if config_class.own_masks else frozenset()
        config_class.check_dense = partial(check_once, main, any_class=True)
    return family


def _own_masks(main: type[PreTrainedModel], config: PreTrainedConfig) -> OwnMasks:
    with apart():
        try:
            model, inputs, _ = tiny_with_inputs(main, config)
        except FAILURES:
            return {}
        return find_own_masks(model, inputs)


def main_class(
    dense_config: type[PreTrainedConfig], others: Iterable[type[PreTrainedModel]] = ()
) -> type[PreTrainedModel] | None:
    """The class of Transformers that stands for a family: the model without a head, or the first that there is."""
    known = MODEL_MAPPING.get(dense_config, None)
    known = known[0] if isinstance(known, (list, tuple)) else known
    # two types may share a class, which is the one's whose configuration it takes
    return known if known is not None and known.config_class is dense_config else next(iter(others), None)


def _has_two_stacks(dense_config: type[PreTrainedConfig]) -> bool:
    config = dense_config()
    return bool(config.is_encoder_decoder) and all(field_of(config, names) for names, _ in SIDES.values())


def _other_heads(dense_config: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """The models of a configuration's modelling file that take it, whether or not an Auto class knows them."""
    module = modeling_module(dense_config)
    return [
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, PreTrainedModel)
        and found.__module__ == module.__name__
        and found.config_class is dense_config
        and not found.__name__.endswith("PreTrainedModel")
        and found.forward is not nn.Module.forward
    ]
