"""The sparse classes of a family that is no entry of the table, made from what Transformers' own classes say."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from ..hf.derive import subclass
from ..hf.model_mixin import SparseEncoderMixin
from ..hf.register import Family, modeling_module, register_family
from .attention_modules import number_attention
from .check import check_once
from .config import SIDES, DerivedConfigMixin, DerivedEncoderDecoderConfigMixin, field_of
from .distance_bias import biased_parts
from .entry import DerivedFamily, dense_config_class
from .own_masks import OVERLAYS, OwnMasks, find_own_masks
from .positions import UNKNOWN, FoundPositions, find_positions
from .tiny_model import FAILURES, apart, quiet, tiny_with_inputs

# class attributes of every head
OF_HEADS = {"number_layers": number_attention}


def derive(entry: DerivedFamily) -> Family:
    """Make the classes of a family and register them. They become attributes of `entry.module`.

    Raises:
        ValueError: a configuration class that needs arguments, so that nothing can be found of it.
    """
    dense_config = dense_config_class(entry.dense_type)
    default = _default(dense_config)
    has_two = _has_two_stacks(default)
    mixin = DerivedEncoderDecoderConfigMixin if has_two else DerivedConfigMixin
    doc = f"[`{dense_config.__name__}`] with a pattern for each layer."
    config_class = subclass(entry.module, (mixin, dense_config), model_type=entry.sparse_type, __doc__=doc)
    heads = models_of(dense_config)
    parts = biased_parts(modeling_module(dense_config), entry.module)
    if has_two:
        # encoders find marks by themselves; other stacks are made as the heads around them are
        encoders = [head for head in heads if head.__name__.endswith("Encoder")]
        annotations = {"config": config_class}
        parts |= {e: subclass(entry.module, (SparseEncoderMixin, e), __annotations__=annotations) for e in encoders}
        heads = [head for head in heads if head not in encoders and hasattr(transformers, head.__name__)]
    main = main_class(dense_config, heads)
    found = UNKNOWN if main is None else find_positions(main, default)
    family = register_family(config_class, found, parts=parts, heads=heads, of_heads=OF_HEADS, verified=False)
    if main is not None:
        config_class.positions = FoundPositions(main, found)
        config_class.own_masks = _own_masks(main, default)
        config_class.own_mask_functions = frozenset(OVERLAYS) if config_class.own_masks else frozenset()
        config_class.check_dense = partial(check_once, main, any_class=True)
    return family


def main_class(
    dense_config: type[PreTrainedConfig], others: Iterable[type[PreTrainedModel]] = ()
) -> type[PreTrainedModel] | None:
    """The class of Transformers that stands for a family: the model without a head, or the first that there is."""
    # the table's type says tuple, which it holds for some configurations
    known: Any = MODEL_MAPPING.get(dense_config, None)
    known = known[0] if isinstance(known, (list, tuple)) else known
    # two types may share a class, which is the one's whose configuration it takes
    return known if known is not None and known.config_class is dense_config else next(iter(others), None)


def _default(dense_config: type[PreTrainedConfig]) -> PreTrainedConfig:
    try:
        with quiet():
            return dense_config()
    except FAILURES as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{dense_config.__name__} cannot be made without arguments: {reason}") from error


def _has_two_stacks(config: Any) -> bool:
    return bool(config.is_encoder_decoder) and all(field_of(config, names) for names, _ in SIDES.values())


def _own_masks(main: type[PreTrainedModel], config: PreTrainedConfig) -> OwnMasks:
    with apart():
        try:
            model, inputs, _ = tiny_with_inputs(main, config)
        except FAILURES:
            return {}
        return find_own_masks(model, inputs)


def models_of(dense_config: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
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
