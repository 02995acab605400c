"""Long texts: a training step whose memory logits and feed-forward layers do not decide.

Legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .deferred_logits import Recipe, defer
from .distillation import unwrapped
from .tiled import find_feed_forward, find_norms, is_compiled, refuse_partitioned, tiled, tiled_forward, tiled_norm

logger = logging.get_logger(__name__)


@dataclass
class LongText:
    """What `long_text` changed, until `remove()` or the end of a `with`.

    Attributes:
        model: the model that was given.
        options: what was asked for.
        in_pieces: names of what is computed in pieces: output layers, feed-forward layers, and norms.
        whole: names of layers whose feed-forward layers are computed whole.
    """

    model: nn.Module
    options: dict[str, Any]
    in_pieces: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    _replaced: list[tuple[nn.Module, str]] = field(default_factory=list, repr=False)
    _checkpoints: bool = field(default=False, repr=False)

    def remove(self) -> None:
        """Make the model what it was; doing it twice does nothing more."""
        for module, method in self._replaced:
            vars(module).pop(method, None)
        base = unwrapped(self.model)
        assert isinstance(base, PreTrainedModel)
        if self._checkpoints:
            base._set_gradient_checkpointing(enable=False)
        self._replaced, self._checkpoints = [], False
        vars(base).pop(KEPT_AS, None)

    def __enter__(self) -> LongText:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def replace(self, name: str, module: nn.Module, method: str, function: Callable, *options: Any) -> None:
        """Have `module.method(...)` call `function(module, method as it was, *options, ...)`."""
        if method in vars(module):
            raise ValueError(f"{name}.{method} was replaced by something else; call long_text before it, or do without")
        # neither a parameter nor a module: state dicts, classes and folders stay as they are
        setattr(module, method, partial(function, module, getattr(module, method), *options))
        self._replaced.append((module, method))
        self.in_pieces.append(name)


# the attribute of a model that holds its LongText
KEPT_AS = "_long_text"


def long_text_of(model: nn.Module) -> LongText | None:
    """What `long_text` changed about a model, if it did."""
    return vars(unwrapped(model)).get(KEPT_AS)


def long_text(
    model: nn.Module,
    *,
    logits: int | None = 2048,
    feed_forward: int | None = 16384,
    checkpoint_layers: bool = True,
    offload: bool = False,
) -> LongText:
    """Have a model train on long texts in little memory, with the same loss and gradients.

    Logits are never whole where a loss is all that is asked of them, feed-forward layers go through
    the text in pieces, and layers are checkpointed. Weights, classes, signatures and what is saved
    stay as they are. A text of fewer tokens than a piece is computed as ever.

        >>> handle = long_text(model)
        >>> Trainer(model, ...).train()
        >>> handle.remove()

    Args:
        model: a model of Transformers, sparse or dense, or one that PEFT wrapped.
        logits: tokens whose logits exist at a time; None leaves logits whole.
        feed_forward: tokens that a feed-forward layer takes at a time, and a norm of float32 in texts of
            more than 8 such pieces; None leaves them whole.
        checkpoint_layers: keep the inputs of layers alone, and compute layers again in the backward
            pass, unless the model does so already.
        offload: keep inputs of layers in the memory of the host.

    Returns:
        A handle, also for `with`, that undoes it and lists what is in pieces and what is not. A
        second call with the same options returns the same handle.

    Raises:
        ValueError: a piece of no tokens, an output layer that is no plain linear layer, a model
            that cannot be checkpointed, offload without checkpoints of ours, or other options than
            those of a call before.
    """
    for name, size in (("logits", logits), ("feed_forward", feed_forward)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; a piece has at least one token, and None leaves all whole")
    base = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{type(base).__name__} is no model of Transformers, which long_text needs")
    options = {
        "logits": logits,
        "feed_forward": feed_forward,
        "checkpoint_layers": checkpoint_layers,
        "offload": offload,
    }
    handle = long_text_of(base)
    if handle is not None:
        if handle.options != options:
            raise ValueError(
                f"long_text was called with {handle.options} before; call remove() of what it returned first"
            )
        return handle
    heads = _output_layers(base) if logits is not None else {}
    handle = LongText(model, options)
    if checkpoint_layers:
        handle._checkpoints = _checkpoint_layers(base, offload)
    elif offload:
        raise ValueError("offload keeps what checkpoints of layers keep; call long_text with checkpoint_layers=True")
    for name, head in heads.items():
        handle.replace(name, head, "forward", _deferred, logits)
    if feed_forward is not None:
        found = find_feed_forward(base)
        for name, (module, method) in found.items():
            function = tiled_forward if method == "forward" else tiled
            handle.replace(name, module, method, function, feed_forward)
        for name, module in find_norms(base, base.config.get_text_config().hidden_size).items():
            if not any(name.startswith(f"{outer}.") and method == "forward" for outer, (_, method) in found.items()):
                handle.replace(name, module, "forward", tiled_norm, feed_forward)
        handle.whole = _without(base, list(found))
        if handle.whole:
            logger.info(f"the feed-forward layers of {', '.join(handle.whole)} are computed whole")
    setattr(base, KEPT_AS, handle)
    return handle


def _deferred(head: nn.Linear, function: Callable, piece: int, hidden: Tensor) -> Tensor:
    """Logits of an output layer, not made yet where `hidden` `[..., D]` has more tokens than a piece."""
    if hidden.numel() <= piece * hidden.shape[-1] or is_compiled():
        return function(hidden)
    refuse_partitioned([head.weight])
    kind = hidden.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return defer(hidden, head.weight, head.bias, Recipe(piece, autocast))


def _output_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that make logits, by name; none in a model without a vocabulary to answer with."""
    output = model.get_output_embeddings()
    if output is None:
        return {}
    names = {module: name for name, module in model.named_modules()}
    # peft keeps the layer and trained copies of it
    copies = getattr(output, "modules_to_save", None)
    found = {names[m]: m for m in ([output] if copies is None else [output.original_module, *copies.values()])}
    for name, module in found.items():
        if type(module).forward is not nn.Linear.forward:
            raise ValueError(
                f"the output layer {name} is {type(module).__name__}, not a plain linear layer; call long_text with logits=None, "
                "or train the layer whole (modules_to_save of peft)"
            )
    return found


def _checkpoint_layers(model: PreTrainedModel, offload: bool) -> bool:
    """Have layers checkpointed; False if they are already."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        if offload:
            raise ValueError(
                "layers are checkpointed already; call activation_checkpointing_disable() first, or offload=False"
            )
        return False
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"layers of {type(model).__name__} cannot be checkpointed; call long_text with checkpoint_layers=False"
        )
    function = _offloaded if offload else partial(checkpoint, use_reentrant=False)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    return True


def _offloaded(function: Callable, *args: Any) -> Any:
    """`checkpoint` that keeps its inputs in the memory of the host."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False)


def _without(model: nn.Module, feed_forward: list[str]) -> list[str]:
    """Layers, of those that are repeated, which have no feed-forward layer in pieces."""
    layers = (name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer))
    return [name for name in layers if not any(f"{piece}.".startswith(f"{name}.") for piece in feed_forward)]
