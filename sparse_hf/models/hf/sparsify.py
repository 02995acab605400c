"""`sparsify`: the sparse counterpart of a model in memory, with its weights shared."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...pattern.like import PatternLike
from .counterparts import COUNTERPARTS, adopt
from .hearing import hearing_warnings, is_causal
from .indexer import UNTRAINED, fit_indexers, has_new_indexers
from .layer_spec import LayersLike
from .layers import stacks_of
from .register import Family, dense_class, family_of, find_composed, find_family
from .saving import ReadsParts
from .short_angles import hold_angles

logger = logging.get_logger(__name__)

# after the name of a model that was made sparse and has no folder yet
UNSAVED = " (made sparse in memory: save_pretrained it, and load that folder)"

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def sparsify(
    model: PreTrainedModel,
    pattern: PatternLike | None = None,
    layers: LayersLike = None,
    global_token_ids: Sequence[int] = (),
    decode: str | None = None,
    indexer: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """A sparse model that shares every parameter and buffer with `model`, which stays as it is.

    Args:
        model: a model of a supported family, dense or already sparse. Of a model of text and images or sounds it is the text
            that gets the pattern, and `marked()` may speak of an image's tokens there.
        pattern: a `Pattern` or its text; families that are sparse by themselves (Longformer, LED, BigBird, Perceiver) need none.
        layers: which layers get another pattern, see `sparse_hf.models.parse_layers`.
        global_token_ids: token ids that `marked()` speaks of wherever they occur.
        decode: "dense" has `generate` read a prompt by the pattern, and decode behind it as the dense model does.
        indexer: "heads" and "width" of what `topk(..., 'indexer')` scores keys by, by default 8 heads of 64; with "share" so
            many neighbours of the layers that have such a pattern go by the indexer of the first of them. Its weights are new, and random
            until `sparse_hf.train.train_indexer` trains them.

    Raises:
        ValueError: a family or a head without a sparse counterpart, a bad pattern, or hooks that move weights about.

    Examples:
        >>> dense = AutoModelForCausalLM.from_pretrained("my-llama")
        >>> sparse = sparsify(dense, "window(255, 0) | first(4)", layers="0=dense")
        >>> type(sparse).__name__
        'SparseLlamaForCausalLM'
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"sparsify takes a model of Transformers that is loaded, and got {_spelt(model)}; load it with from_pretrained, or "
            "make a sparse folder with sparse_hf.convert"
        )
    family = find_family(model.config.model_type)
    if family is None or type(model) not in COUNTERPARTS and type(model) not in family.classes:
        composed = find_composed(model.config.model_type)
        if composed is not None:
            return _around_text(model, composed, (pattern, layers, global_token_ids, decode, indexer))
        _refuse_around(model)
    family = family_of(model.config.model_type)
    if type(model) not in COUNTERPARTS and type(model) not in family.classes:
        heads = ", ".join(dense_class(c).__name__ for c in family.classes)
        raise ValueError(f"{type(model).__name__} has no sparse counterpart; of {family.dense_type} there are {heads}")
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        raise ValueError(
            f"accelerate's hooks on {hooked[0] or 'the model'!r} hold on to the dense modules; call sparsify before "
            "dispatching, or accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    _check_derived(family, model)
    config = family.config_class.from_dense(model.config, pattern, layers, global_token_ids, decode, indexer)
    sparse = _around_weights(model, config)
    positions = config.positions or family.positions
    for warning in hearing_warnings(config, is_causal(model), positions.reach_of(config), stacks_of(sparse)):
        # a loop over patterns would say it over and over
        logger.warning_once(f"{type(model).__name__}: {warning}")
    if has_new_indexers(sparse, model):
        logger.warning_once(f"{type(model).__name__}: {UNTRAINED}")
    _name_no_folder(sparse)
    return sparse


def _check_derived(family: Family, model: PreTrainedModel) -> None:
    """Have a family that is no entry of the table compared with its dense class, on a tiny copy."""
    if not family.verified and not isinstance(model.config, family.config_class):
        # by name, because it makes models sparse itself
        import_module("..derived.check", __package__).check_once(type(model), model.config)


def shared_sparse(model: PreTrainedModel, pattern: PatternLike, named: bool = False) -> PreTrainedModel:
    """As `sparsify`, of a class that is known to have a counterpart; `named` leaves no layer its own window."""
    config_class = family_of(model.config.model_type).config_class
    stacks = config_class.from_dense(model.config, "window(None, None)").stacks
    layers: dict[str | int, Any] = {stack: [pattern] * count for stack, count in stacks.items()}
    every = layers.get("", layers) if named else None
    return _around_weights(model, config_class.from_dense(model.config, pattern, every))


def _around_weights(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """The sparse model of a configuration around the parameters and buffers of a dense one."""
    # chosen when the dense model was built, and not part of what a configuration says of itself
    experts = getattr(model.config, "_experts_implementation", None)
    if experts is not None:
        config._experts_implementation = experts
    sparse = _shared_copy(model, _Configs(model.config, config), {})
    adopt(sparse)
    fit_indexers(sparse, config)
    hold_angles(sparse, config)
    return sparse


def _around_text(model: PreTrainedModel, family: Family, asked: tuple[Any, ...]) -> PreTrainedModel:
    """A model of several around its text, which is made sparse."""
    dense: Any = model.config.get_text_config()
    texts = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model and m.config is dense)
    text = next(texts, None)
    if text is None:
        raise ValueError(
            f"{type(model).__name__} holds no model with its text_config, so that there is nothing to make sparse"
        )
    if not isinstance(model.config, ReadsParts):
        import_module("..derived.check", __package__).check_composed(type(model), model.config)
    made = sparsify(text, *asked)
    config: Any = family.config_class
    config = config.around(model.config, made.config)
    own = {dense_class(c): c for c in family.classes}
    sparse = _shared_copy(model, _Configs(model.config, config), {id(text): made}, own)
    _name_no_folder(sparse)
    return sparse


def _name_no_folder(sparse: PreTrainedModel) -> None:
    """Have a model in memory no longer name the folder of the dense one, which others would load in its place.

    An adapter writes down the name of its model, and TRL loads a second one by that of the configuration.
    """
    name = vars(sparse).get("name_or_path") or sparse.config._name_or_path
    for module in sparse.modules():
        if isinstance(module, PreTrainedModel):
            vars(module)["name_or_path"] = name and f"{name.removesuffix(UNSAVED)}{UNSAVED}"
            module.config._name_or_path = ""


def _refuse_around(model: PreTrainedModel) -> None:
    """Raise ValueError for a model without a sparse counterpart that holds models with one, and say how to make these sparse."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        is_within = any(name.startswith(f"{outer}.") for outer in found)
        if name and not is_within and isinstance(module, PreTrainedModel):
            family = find_family(module.config.model_type)
            if family is not None and (type(module) in COUNTERPARTS or type(module) in family.classes):
                found[name] = module
    if not found:
        return
    first, child = next(iter(found.items()))
    part = next((key for key, value in vars(model.config).items() if value is child.config), None)
    then = (
        ""
        if part is None
        else f", and model.config.{part} = model.{first}.config, so that what is saved names the pattern"
    )
    raise ValueError(
        f"{type(model).__name__} has no sparse counterpart, and models within it have: {', '.join(found)}. Make each sparse by itself, "
        f"model.{first} = sparse_hf.sparsify(model.{first}, pattern){then}"
    )


def _spelt(value: Any) -> str:
    return repr(value) if isinstance(value, (str, PathLike)) else f"a {type(value).__name__}"


class _Configs:
    """Dense configuration -> sparse one. Stacks of T5 hold copies of the model's with fields of their own."""

    def __init__(self, dense: PreTrainedConfig, sparse: PreTrainedConfig):
        self.dense, self.known = dense, {id(dense): sparse}

    def __call__(self, found: PreTrainedConfig) -> PreTrainedConfig:
        if id(found) not in self.known:
            twin = copy.copy(self.known[id(self.dense)])
            own = {key: value for key, value in vars(found).items() if value != vars(self.dense).get(key)}
            twin.__dict__.update({key: value for key, value in own.items() if not key.startswith("_")})
            self.known[id(found)] = twin
        return self.known[id(found)]


def forget_preparation(module: nn.Module) -> None:
    """Take from a model what accelerate has left there when it prepared it for training.

    That is, for mixed precision, a forward of this very model, which a copy would run in place of its own; and the word that the model
    is prepared, by which a second Trainer would do without mixed precision. `unwrap_model` of accelerate takes the sparse forward too.
    """
    own = vars(module)
    own.pop("_is_accelerate_prepared", None)
    if own.pop("_original_forward", None) is not None:
        del own["forward"]


def _shared_copy(
    module: AnyModule, configs: _Configs, done: dict[int, Any], classes: Mapping[type, type] = COUNTERPARTS
) -> AnyModule:
    """A copy of the module tree around the same parameters and buffers, of modules that are not done yet."""
    if id(module) in done:
        return done[id(module)]
    if isinstance(module, PreTrainedModel) and type(module.config) is not type(configs.dense):
        # a model inside that has a configuration of its own stays what it is, and so does all that is in it
        classes = {}
    # some classes refuse to be copied, those of weights that are computed of others among them
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    done[id(module)] = twin
    forget_preparation(twin)
    for name in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        twin.__dict__[name] = module.__dict__[name].copy()
    twin._modules = {
        name: None if child is None else _shared_copy(child, configs, done, classes)
        for name, child in module._modules.items()
    }
    for name, value in module.__dict__.items():
        if type(value) is type(configs.dense):
            twin.__dict__[name] = configs(value)
    twin.__class__ = classes.get(type(module), type(module))
    return twin
