"""Is a derived family what its dense class is? A tiny copy of its configuration says so, in a second or two.

The copy is compared with the dense class under a pattern of all pairs, and under a narrow pattern that the dense class
takes as an explicit mask, where it takes one. A token that is changed must have no influence beyond what the pattern
reaches. And every layer that mixes tokens must be seen to have asked our attention function, or be of another kind: a
family whose attention goes another way would stay dense without a word.

Legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ...pattern import Pattern
from ..hf.attention_interface import sparse_attention_forward, sparse_mask
from ..hf.mask_request import MaskRequest
from .samples import fresh
from .tiny_config import tiny_config
from .tiny_model import FAILURES, apart, quiet, tiny_with_inputs

FULL, NARROW, NEXT = "window(None, None)", "window(2, 1) | first(1)", "window(1, 1)"
# answers that differ by less, beside the greatest of them, are the same
TOLERANCE = 2e-4
# modules that mix tokens and are no attention over pairs: they stay what they are
OTHER_KIND = re.compile(
    r"mamba|conv(?!ersion)|ssm|delta|linear_?att|lightning|recurrent|rwkv|retention|lstm|gru|kda|lru|fourier|shift|spatial|pooling",
    re.IGNORECASE,
)
SEEN = "sparse_seen"


@dataclass
class Arrivals:
    """The attention modules that asked our attention function, by their identity."""

    modules: dict[int, nn.Module] = field(default_factory=dict)
    is_causal: bool = False
    # answer zeros in place of attention, to see what else mixes tokens
    is_silent: bool = False


_ARRIVALS: ContextVar[Arrivals | None] = ContextVar("arrivals", default=None)


def _seen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    arrivals = _ARRIVALS.get()
    given = (*args, kwargs.get("attention_mask"), kwargs.get("position_bias"))
    if any(isinstance(t, Tensor) and t.ndim == 4 and t.is_floating_point() and min(t.shape[:2]) > 1 for t in given):
        raise RefusedError(
            f"{type(module).__name__} adds a bias to each pair of tokens that depends on what is in them, not on their distance "
            "alone, so that it is as large as all pairs"
        )
    out, weights = sparse_attention_forward(module, query, key, value, *args, backend="reference", **kwargs)
    if arrivals is not None:
        arrivals.modules[id(module)] = module
        arrivals.is_causal |= _is_causal(module, args, kwargs)
        out = torch.zeros_like(out) if arrivals.is_silent else out
    return out, weights


def _is_causal(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    request = args[0] if args else kwargs.get("attention_mask")
    own = kwargs.get("is_causal", getattr(module, "is_causal", False))
    return request.reading(own)[0] if isinstance(request, MaskRequest) else bool(own)


AttentionInterface.register(SEEN, _seen)
AttentionMaskInterface.register(SEEN, sparse_mask)


class RefusedError(ValueError):
    """A family that is on the attention interface and cannot be made sparse as it is; the message says what was seen."""


@dataclass(frozen=True)
class Seen:
    """What a check has seen.

    Attributes:
        arrived: attention modules that asked our function.
        mixing: layers that mix tokens in another way.
        took_mask: was the dense class compared under an explicit mask?
    """

    arrived: int
    mixing: tuple[str, ...]
    took_mask: bool


# configuration class and tiny configuration -> the dense classes that were compared and are alike
_PASSED: dict[tuple[type, str], dict[type, Seen]] = {}
_WITHIN: ContextVar[bool] = ContextVar("within", default=False)


def check_once(dense_class: type[PreTrainedModel], config: PreTrainedConfig, any_class: bool = False) -> None:
    """As `check`, remembered as long as the process lives.

    Args:
        any_class: be content if another class passed with this configuration.

    Raises:
        RefusedError: what was seen says that no pattern would hold.
    """
    if _WITHIN.get():
        return
    passed = _PASSED.setdefault((type(config), _digest(config)), {})
    if dense_class in passed or any_class and passed:
        return
    passed[dense_class] = check(dense_class, config)


def _digest(config: PreTrainedConfig) -> str:
    """What two configurations share that have the same tiny copy."""
    try:
        with quiet():
            return json.dumps(tiny_config(config).to_dict(), sort_keys=True, default=str)
    except FAILURES:
        return ""


def check_composed(dense_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Compare a tiny model around a text with the dense one, on text alone; remembered as long as the process lives.

    Raises:
        RefusedError: its text is not what it is in the dense class, or does not keep to a pattern.
    """
    # by name, because it asks for this check itself
    sparsify = import_module("..hf.sparsify", __package__).sparsify
    passed = _PASSED.setdefault((type(config), _digest(config)), {})
    if _WITHIN.get() or dense_class in passed:
        return
    name, token = dense_class.__name__, _WITHIN.set(True)
    try:
        with apart():
            dense, inputs, answer = tiny_with_inputs(dense_class, config)
            full, narrow = (tensors_of(sparsify(dense, pattern)(**fresh(inputs))) for pattern in (FULL, NARROW))
            wanted = tensors_of(answer)
    except FAILURES as error:
        raise RefusedError(f"a tiny copy of {name} cannot be made sparse in its text: {_line(error)}") from error
    finally:
        _WITHIN.reset(token)
    off = _difference(full, wanted)
    if not off <= TOLERANCE:
        raise RefusedError(
            f"{name} around a text under a pattern of all pairs is not what the dense class is: answers differ by {off:.1e}"
        )
    if _difference(narrow, wanted) <= TOLERANCE:
        raise RefusedError(f"the text of {name} does not go by a pattern")
    passed[dense_class] = Seen(0, (), False)


def check(dense_class: type[PreTrainedModel], config: PreTrainedConfig) -> Seen:
    """Compare a tiny sparse model with the dense one.

    Args:
        dense_class: a class of Transformers.
        config: its configuration, of any size.

    Raises:
        RefusedError: what was seen says that no pattern would hold.
    """
    token = _WITHIN.set(True)
    with apart():
        try:
            return _compared(dense_class, config)
        finally:
            _WITHIN.reset(token)


def _compared(dense_class: type[PreTrainedModel], config: PreTrainedConfig) -> Seen:
    try:
        dense, inputs, answer = tiny_with_inputs(dense_class, config)
    except FAILURES as error:
        raise RefusedError(f"no tiny copy of {dense_class.__name__} could be made: {_line(error)}") from error
    return _Trial(dense, inputs, answer).run()


class _Trial:
    """A tiny dense model, and sparse ones that share its weights."""

    def __init__(self, dense: PreTrainedModel, inputs: dict[str, Any], answer: Any):
        self.dense, self.inputs = dense, inputs
        self.wanted = tensors_of(answer)
        self.name = type(dense).__name__

    def run(self) -> Seen:
        arrivals = Arrivals()
        found = self.answers(self.sparse(FULL), arrivals)
        if not arrivals.modules:
            raise RefusedError(f"no attention of {self.name} asked Transformers' attention interface for its function")
        off = _difference(found, self.wanted)
        if not off <= TOLERANCE and self.dense._supports_sdpa:
            # some classes look back only under sdpa, where a mask is not what says so
            self.dense.config._attn_implementation = "sdpa"
            self.wanted = tensors_of(self.dense(**fresh(self.inputs)))
            off = min(off, _difference(found, self.wanted))
        if not off <= TOLERANCE:
            raise RefusedError(
                f"{self.name} under a pattern of all pairs is not what the dense class is: answers differ by {off:.1e}"
            )
        took_mask = self.compare_mask()
        mixing = self.check_leaks(len(arrivals.modules))
        return Seen(len(arrivals.modules), mixing, took_mask)

    def sparse(self, pattern: str) -> PreTrainedModel:
        """A sparse model with this pattern in each layer, whatever window the family has."""
        from ..hf.sparsify import shared_sparse

        try:
            made = shared_sparse(self.dense, pattern, named=pattern != FULL)
        except FAILURES as error:
            raise RefusedError(f"{self.name} cannot be made sparse: {_line(error)}") from error
        for module in made.modules():
            own = vars(module).get("config")
            if isinstance(own, PreTrainedConfig):
                vars(own)["_attn_implementation_internal"] = SEEN
        return made

    def answers(self, model: PreTrainedModel, arrivals: Arrivals) -> list[Tensor]:
        token = _ARRIVALS.set(arrivals)
        try:
            return tensors_of(model(**fresh(self.inputs)))
        except RefusedError:
            raise
        except FAILURES as error:
            reason = f"the attention of {self.name} does not fit ours: {_line(error)}"
            if MaskRequest.__name__ in str(error):
                reason = f"{self.name} computes with the mask of all pairs, which sparse attention never makes ({_line(error)})"
            raise RefusedError(reason) from error
        finally:
            _ARRIVALS.reset(token)

    def compare_mask(self) -> bool:
        """Compare with the dense class under an explicit mask; False if it takes none."""
        ids = self.inputs.get("input_ids")
        if ids is None or self.dense.config.is_encoder_decoder or "attention_mask" in self.inputs:
            return False
        arrivals = Arrivals()
        found = self.answers(self.sparse(NARROW), arrivals)
        pattern, place = Pattern.parse(NARROW), torch.arange(ids.shape[1])
        held = pattern.allows(place[:, None], place)
        if arrivals.is_causal:
            held = held & (place[:, None] >= place)
        mask = torch.where(held, 0.0, torch.finfo(torch.float32).min).expand(len(ids), 1, -1, -1)
        try:
            wanted = tensors_of(self.dense(**fresh(self.inputs), attention_mask=mask))
        except FAILURES:
            return False
        if _difference(wanted, self.wanted) <= TOLERANCE:
            # it goes unread
            return False
        off = _difference(found, wanted)
        if not off <= TOLERANCE:
            raise RefusedError(
                f"{self.name} under {NARROW} is not what the dense class is under that mask: answers differ by {off:.1e}"
            )
        return True

    def check_leaks(self, count: int) -> tuple[str, ...]:
        """Change a token within a layer, and see which others change behind it; returns modules that mix in another way."""
        sparse, arrivals = self.sparse(NEXT), Arrivals()
        self.answers(sparse, arrivals)
        if len(arrivals.modules) != count:
            raise RefusedError(
                f"{self.name} asked for attention {count} times under one pattern, {len(arrivals.modules)} under another"
            )
        mixing = []
        for name, layer in _layers(sparse, arrivals.modules):
            attends = any(id(m) in arrivals.modules for m in layer.modules())
            reach = 1 if attends else 0
            if self.influence(sparse, layer) <= reach:
                continue
            # what is known to be of another kind may mix, and nothing else
            others = _of_another_kind(layer, type(self.dense.config).__name__.removesuffix("Config"))
            if not others or self.influence(sparse, layer, silent=list(others.values())) > 0:
                how = "beyond its pattern" if attends else "without asking for our attention"
                raise RefusedError(f"{name} of {self.name}, a {type(layer).__name__}, mixes tokens {how}")
            mixing.append(f"{name}.{next(iter(others))}")
        return tuple(mixing)

    def influence(self, model: PreTrainedModel, layer: nn.Module, silent: Sequence[nn.Module] = ()) -> int:
        """How far from a token, of which a layer's input is changed, its output changes; 0 where it has no tokens.

        Args:
            silent: modules whose output is zero meanwhile, and that of our attention with them.
        """
        plain = self.outputs(model, layer, None, silent)
        if not plain:
            return 0
        tokens = plain[0].shape[-2]
        changed = self.outputs(model, layer, tokens // 2, silent)
        off = torch.stack([_by_token(a - b) for a, b in zip(plain, changed, strict=True)]).amax(0)
        touched = off > 1e-5 * max(1.0, float(plain[0].abs().max()))
        distance = (torch.arange(tokens) - tokens // 2).abs()
        return int(torch.where(touched, distance, 0).max())

    def outputs(
        self, model: PreTrainedModel, layer: nn.Module, place: int | None, silent: Sequence[nn.Module]
    ) -> list[Tensor]:
        """What a layer gives for states `[..., N, D]`, each time that it is called; one token of them changed."""
        found: list[Tensor] = []

        def change(_: nn.Module, args: tuple, kwargs: dict):
            states = _states(args, kwargs)
            if place is None or states is None:
                return None
            states = states.clone()
            states.select(-2, place).add_(torch.linspace(-1, 1, states.shape[-1]))
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        def keep(_: nn.Module, args: tuple, kwargs: dict, output: Any):
            states, out = _states(args, kwargs), output[0] if isinstance(output, tuple) else output
            if states is not None and isinstance(out, Tensor) and out.shape == states.shape:
                found.append(out.clone())

        hooks = [layer.register_forward_pre_hook(change, with_kwargs=True)]
        hooks += [layer.register_forward_hook(keep, with_kwargs=True)]
        hooks += [module.register_forward_hook(_silenced) for module in silent]
        try:
            self.answers(model, Arrivals(is_silent=bool(silent)))
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _states(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    states = args[0] if args else kwargs.get("hidden_states")
    return states if isinstance(states, Tensor) and states.ndim >= 2 and states.is_floating_point() else None


def _silenced(_module: nn.Module, _args: tuple, output: Any) -> Any:
    """Zeros in place of what a module gives; of several things, in place of the first."""
    if isinstance(output, tuple) and output:
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output) if isinstance(output, Tensor) else output


def _by_token(difference: Tensor) -> Tensor:
    """`[..., N, D]` -> `[N]`: the greatest difference of each token."""
    return difference.abs().amax(-1).reshape(-1, difference.shape[-2]).amax(0)


def _of_another_kind(layer: nn.Module, family: str) -> dict[str, nn.Module]:
    """The outermost modules of a layer that mix tokens in another way, told by the names of their classes or by their own.

    Args:
        family: what all classes of the family begin with, which says nothing of a module.
    """
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        is_within = any(name.startswith(f"{outer}.") for outer in found)
        names = f"{type(module).__name__.removeprefix(family)} {name.rpartition('.')[2]}"
        if name and not is_within and OTHER_KIND.search(names) and "norm" not in names.lower():
            found[name] = module
    return found


def _layers(model: nn.Module, arrived: dict[int, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The elements of every list of modules, but for those of lists within layers that attend."""
    found: dict[int, tuple[str, nn.Module]] = {}
    within: list[str] = []
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # the innermost lists that hold attention first
    for name, module in sorted(lists, key=lambda entry: -entry[0].count(".")):
        holds = any(id(m) in arrived for m in module.modules())
        if holds and any(inner.startswith(f"{name}.") for inner in within):
            continue
        if holds:
            within.append(name)
            found |= {id(layer): (f"{name}.{i}", layer) for i, layer in enumerate(module)}
    for name, module in lists:
        if not any(name.startswith(f"{outer}.") or outer.startswith(f"{name}.") for outer in within):
            found |= {id(layer): (f"{name}.{i}", layer) for i, layer in enumerate(module) if id(layer) not in found}
    return list(found.values())


def tensors_of(answer: Any) -> list[Tensor]:
    """The floating tensors of an answer, in order."""
    if isinstance(answer, Tensor):
        return [answer] if answer.is_floating_point() else []
    if isinstance(answer, dict):
        skipped = ("attentions", "cross_attentions", "decoder_attentions", "encoder_attentions", "past_key_values")
        return [t for name, value in answer.items() if name not in skipped for t in tensors_of(value)]
    return [t for value in answer for t in tensors_of(value)] if isinstance(answer, (list, tuple)) else []


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The greatest difference beside the greatest value; infinite where answers have other shapes."""
    if [t.shape for t in found] != [t.shape for t in wanted] or not found:
        return float("inf")
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a.numel()]
    off = []
    for a, b in pairs:
        same = (a == b) | (a.isnan() & b.isnan())
        off.append(
            float(torch.where(same, 0.0, (a - b).detach().abs()).max()) / max(1.0, float(b[b.isfinite()].abs().max()))
        )
    return max(off)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
