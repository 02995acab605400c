"""Models of text and images or sounds: their text stack made sparse, and the classes around it.

Such a model has no layers of its own, and a configuration for each model within it. Its sparse class hands marks on to the text,
which sees no ids of its own, and its sparse configuration reads the models within as what they were saved as: Transformers' own
would read a sparse text as a dense one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import CONFIG_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..hf.cache import given_cache, over_slots
from ..hf.config import NOT_DENSE, SparseConfigMixin
from ..hf.counterparts import COUNTERPARTS, adopt
from ..hf.derive import subclass
from ..hf.marks import find_marks, generation_marks, step_marks
from ..hf.model_mixin import PREPARES, SparseMixin, with_marks_signature
from ..hf.register import Family, register_family
from ..hf.saving import ReadsParts
from ..hf.streaming_cache import StreamingCache
from ..names import IMPLEMENTATIONS
from .derive import models_of
from .entry import TEXT, DerivedFamily, dense_config_class
from .positions import UNKNOWN

if TYPE_CHECKING:
    _Config, _Model = PreTrainedConfig, PreTrainedModel
else:
    _Config = _Model = object

# what a configuration holds and does not say
CHOSEN = ("_attn_implementation_internal", "_experts_implementation_internal")
_DENSE_IMPLEMENTATION: Any = vars(PreTrainedConfig)["_attn_implementation"]
AnyConfig = TypeVar("AnyConfig", bound="ComposedConfigMixin")


class ComposedConfigMixin(ReadsParts, _Config):
    """A configuration whose `text_config` is that of a sparse model."""

    def __post_init__(self, **kwargs):
        for name in self.sub_configs:
            given = getattr(self, name, None)
            kind = given.get("model_type", "") if isinstance(given, Mapping) else ""
            if kind.startswith("sparse_"):
                values = {key: value for key, value in given.items() if key != "model_type"}
                setattr(self, name, CONFIG_MAPPING[kind](**values))
        super().__post_init__(**kwargs)

    @classmethod
    def around(cls: type[AnyConfig], dense: PreTrainedConfig, text: SparseConfigMixin) -> AnyConfig:
        """The counterpart of a configuration of Transformers, around that of a sparse text and those of its other models."""
        values = {key: value for key, value in dense.to_dict().items() if key not in NOT_DENSE}
        parts = {name: getattr(dense, name, None) for name in dense.sub_configs} | {TEXT: text}
        # making a configuration sets the attention implementation of those within it, which modules hold already
        made = cls(**{**values, **copy.deepcopy(parts)})
        vars(made).update(parts, **{name: vars(dense).get(name) for name in CHOSEN})
        return made

    def _set_attn_implementation(self, value: Any) -> None:
        # names of ours are the sparse models', and Transformers' are the others'
        if not isinstance(value, dict):
            parts = {name: part for name in self.sub_configs if (part := getattr(self, name, None)) is not None}
            sparse = {name for name, part in parts.items() if isinstance(part, SparseConfigMixin)}
            takes = sparse if value in IMPLEMENTATIONS else set(parts) - sparse
            value = dict.fromkeys(takes, value) | ({} if value in IMPLEMENTATIONS else {"": value})
        _DENSE_IMPLEMENTATION.fset(self, value)

    _attn_implementation = property(  # pyright: ignore[reportAssignmentType]
        _DENSE_IMPLEMENTATION.fget, _set_attn_implementation
    )

    def get_text_config(self, decoder=None, encoder=None):
        """As Transformers', of the text as it answers itself: caches of it drop no keys."""
        found = super().get_text_config(decoder, encoder)
        return found.get_text_config(decoder, encoder) if isinstance(found, SparseConfigMixin) else found


class ComposedMixin(_Model):
    """A model around a sparse text: `global_attention_mask` marks tokens of the text, those of an image among them."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            cls.forward = _with_marks(super(cls, cls).forward)
            if issubclass(cls, GenerationMixin):
                setattr(cls, PREPARES, _with_own_inputs(getattr(super(cls, cls), PREPARES)))

    create_masks_for_generate = staticmethod(SparseMixin.create_masks_for_generate)

    @classmethod
    def is_custom_code(cls) -> bool:
        # as of every sparse class
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def post_init(self):
        super().post_init()
        adopt_text(self)


def adopt_text(model: torch.nn.Module) -> None:
    """Give the models within `model` that were built by a sparse configuration their sparse class; others stay what they are."""
    for child in list(model.modules()):
        is_sparse = isinstance(getattr(child, "config", None), SparseConfigMixin) and isinstance(child, PreTrainedModel)
        if is_sparse and type(child) in COUNTERPARTS:
            child.__class__ = COUNTERPARTS[type(child)]
            adopt(child)


def _with_marks(parent: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(parent)
    names = list(signature.parameters)[1:]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    @wraps(parent)
    def forward(self, *args, global_attention_mask=None, **kwargs):
        text = self.config.get_text_config()
        ids = {**dict(zip(names, args, strict=False)), **kwargs}.get("input_ids")
        marks = global_attention_mask
        if isinstance(text, SparseConfigMixin) and text.uses_marks:
            marks = find_marks(text, ids, marks)
        if marks is not None and not takes_more:
            raise NotImplementedError(
                f"{type(self).__name__} hands no arguments of ours on to its text, so that nothing in it can be marked; give a "
                "pattern without marked()"
            )
        return parent(self, *args, **kwargs, **({} if marks is None else {"global_attention_mask": marks}))

    forward.__dict__["__signature__"] = with_marks_signature(signature)
    return forward


def _with_own_inputs(parent: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    names = list(inspect.signature(parent).parameters)[2:]

    @wraps(parent)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = parent(self, input_ids, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        text = self.config.get_text_config()
        if not isinstance(text, SparseConfigMixin):
            return inputs
        if isinstance(given_cache(given), StreamingCache):
            marks = step_marks(text, input_ids, given, inputs)
        else:
            marks = generation_marks(text, input_ids, given.get("global_attention_mask"), given)
            marks = None if marks is None else over_slots(marks, given)
        return {**inputs, "global_attention_mask": marks}

    return prepare_inputs_for_generation


def derive_composed(entry: DerivedFamily) -> Family:
    """Make the classes of a model of several and register them. They become attributes of `entry.module`."""
    dense_config = dense_config_class(entry.dense_type)
    doc = f"[`{dense_config.__name__}`] whose text has a pattern for each layer."
    config_class = subclass(
        entry.module, (ComposedConfigMixin, dense_config), model_type=entry.sparse_type, __doc__=doc
    )
    heads = models_of(dense_config)
    for head in heads:
        content = {"config_class": config_class, "__annotations__": {"config": config_class}}
        doc = f"[`{head.__name__}`] with sparse attention in its text."
        subclass(entry.module, (ComposedMixin, head), **content, __doc__=doc)
    return register_family(config_class, UNKNOWN, heads=heads, verified=False)
