"""What a training step will hold, worked out from a model's shape before anything is run.

Legend: T tokens of a process, D hidden size, V vocabulary, L layers. A hidden state is T x D numbers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .distillation import shifts, unwrapped
from .long_text import long_text
from .tiled import NORMS_FROM_PIECES, find_norms

# how a step is run, by name
WAYS = ("plain", "checkpointing", "long_text", "offload")
# copies of each weight that an optimizer keeps, in the weights' dtype
OPTIMIZERS = {"none": 0, "sgd": 0, "adamw": 2}
# bytes of what is computed in float32, and of ids
WIDE, ID = 4, 8
DEFAULTS = {name: p.default for name, p in inspect.signature(long_text).parameters.items()}


@dataclass(frozen=True)
class MemoryPlan:
    """What one process holds at most in a training step, in bytes.

    Attributes:
        peak: at the fullest moment.
        moment: which that is: "loss", "layer" (the first in the backward pass), "gradients" (all are there) or "optimizer".
        parts: what the peak is made of.
        tokens: of this process.
    """

    peak: int
    moment: str
    parts: dict[str, int]
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """How a step is run.

    Attributes:
        length: tokens of a text.
        rows: texts of a process, or of all processes that share them.
        gpus: processes.
        way: "plain", "checkpointing" (of layers alone), "long_text", or "offload" (`long_text` with inputs of layers on the host).
        split: do the processes share each text, by `split_sequence`?
        fsdp: do they share weights, gradients and the optimizer's state, by FSDP2?
        optimizer: "none", "sgd" or "adamw".
        dtype: of weights and activations.
        logits, feed_forward: as of `long_text`.
    """

    length: int
    rows: int = 1
    gpus: int = 1
    way: str = "long_text"
    split: bool = False
    fsdp: bool = False
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.bfloat16
    logits: int = DEFAULTS["logits"]
    feed_forward: int = DEFAULTS["feed_forward"]

    def __post_init__(self):
        for name in ("length", "rows", "gpus", "logits", "feed_forward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, known in (("way", WAYS), ("optimizer", tuple(OPTIMIZERS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; the known ones are {', '.join(known)}")
        if self.gpus == 1 and (self.split or self.fsdp):
            raise ValueError("split and fsdp take several processes, and gpus is 1")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype is {self.dtype}; weights are of a floating dtype")

    @property
    def tokens(self) -> int:
        return self.rows * (-(-self.length // self.gpus) if self.split else self.length)

    @property
    def in_pieces(self) -> bool:
        return self.way in ("long_text", "offload")


def plan_memory(model: PreTrainedModel | PreTrainedConfig, length: int, **how: Any) -> MemoryPlan:
    """What a training step of a model will hold at most, without running it.

    Worked out from shapes: weights, gradients, the optimizer's state, inputs of layers, a layer in work, logits. Attention is taken to
    keep no more than its queries, keys, values and output, as every backend of this package does but for `topk` and
    indexers, whose scores come on top.

        >>> plan = plan_memory(model.config, 1_048_576, gpus=4, split=True)
        >>> plan.peak / 2**30

    Args:
        model: a decoder or encoder with a head over its vocabulary, or its configuration; nothing of it is computed.
        length: tokens of a text.
        how: `rows`, `gpus`, `way`, `split`, `fsdp`, `optimizer`, `dtype`, `logits`, `feed_forward`, as of `Step`.

    Raises:
        ValueError: a step that cannot be, or a model whose layers it cannot read: an encoder-decoder, a mixture of experts.
    """
    step = Step(length, **how)
    shape = Shape.of(_on_meta(model) if isinstance(model, PreTrainedConfig) else unwrapped(model))
    moments = {name: {k: round(v) for k, v in of(shape, step).items() if v} for name, of in MOMENTS.items()}
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(sum(moments[fullest].values()), fullest, moments[fullest], step.tokens)


def _on_meta(config: Any) -> PreTrainedModel:
    """The model of a configuration, without memory for its weights."""
    named = " ".join(config.architectures or [])
    autos = [AutoModelForMaskedLM, AutoModelForCausalLM]
    if "CausalLM" in named or "LMHead" in named:
        autos.reverse()
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if auto is None:
        raise ValueError(
            f"{config.model_type} has no head over its vocabulary; plan_memory takes decoders and encoders with one"
        )
    with torch.device("meta"):
        return auto.from_config(config)


@dataclass(frozen=True)
class Shape:
    """What of a model decides about memory; numbers, not bytes.

    Attributes:
        weights, head: numbers of all weights, and of those over the vocabulary; largest_layer: of a layer.
        hidden, vocabulary, layers: D, V, L.
        queries, keys: numbers of a token's queries, and of its keys and values together.
        inner: numbers of a token that a feed-forward layer's first matrices give.
        norms: of a layer, that go by way of float32 and keep that.
        masks: of dropout that a layer keeps outside its feed-forward layer, a byte a number.
        is_tied: are the head's weights those of the embeddings?
        is_decoder: has the loss logits in float32, as that of decoders of Transformers?
    """

    weights: int
    head: int
    largest_layer: int
    hidden: int
    vocabulary: int
    layers: int
    queries: int
    keys: int
    inner: int
    norms: int
    masks: int
    is_tied: bool
    is_decoder: bool

    @staticmethod
    def of(model: Any) -> Shape:
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder:
            raise ValueError(f"{config.model_type} has two texts; plan_memory takes decoders and encoders")
        output = model.get_output_embeddings()
        if output is None:
            raise ValueError(
                f"{type(model).__name__} has no head over its vocabulary; plan_memory takes models with one"
            )
        layers = {n: m for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
        inner = max((_inner(layer, config.hidden_size) for layer in layers.values()), default=0)
        if not inner:
            raise ValueError(
                f"layers of {type(model).__name__} have no feed-forward layer of linear layers, which plan_memory can read; mixtures of "
                "experts have to be measured"
            )
        norms = [
            name for name in find_norms(model, config.hidden_size) if any(name.startswith(f"{n}.") for n in layers)
        ]
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        dropout = max(
            getattr(config, name, 0) or 0 for name in ("hidden_dropout_prob", "resid_pdrop", "hidden_dropout")
        )
        embeddings = model.get_input_embeddings()
        return Shape(
            weights=sum(p.numel() for p in model.parameters()),
            head=output.weight.numel(),
            largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers.values()),
            hidden=config.hidden_size,
            vocabulary=len(output.weight),
            layers=len(layers),
            queries=heads * head_dim,
            keys=2 * key_heads * head_dim,
            inner=inner,
            norms=-(-len(norms) // len(layers)),
            masks=config.hidden_size if dropout else 0,
            is_tied=embeddings.weight is output.weight,
            is_decoder=shifts(model),
        )


def _inner(layer: nn.Module, hidden: int) -> int:
    """Numbers of a token that the first matrices of a feed-forward layer give."""
    widths = []
    for name, module in layer.named_modules():
        if not re.search("attn|attention", name.replace("attention.output", ""), re.IGNORECASE):
            sides = _sides(module)
            if sides is not None and sides[0] == hidden < sides[1]:
                widths.append(sides[1])
    return sum(widths)


def _sides(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.weight.shape[0], module.nf) if isinstance(module, Conv1D) else None


def _shared(shape: Shape, step: Step) -> tuple[float, float]:
    """Bytes of weights, with what FSDP2 gathers of two layers and of those outside layers; and processes that share them."""
    shares, each = (step.gpus if step.fsdp else 1), step.dtype.itemsize
    gathered = 0
    if step.fsdp:
        outside = shape.weights - shape.layers * shape.largest_layer
        gathered = each * (2 * shape.largest_layer + max(outside, 0))
    return each * shape.weights / shares + gathered, shares


def _kept(shape: Shape, step: Step) -> float:
    """What all layers keep between the passes: their inputs, or all that they need."""
    state = step.tokens * shape.hidden * step.dtype.itemsize
    if step.way == "plain":
        return shape.layers * _saved(shape, step, whole=True)
    # of inputs on the host, two are on their way
    return state * (min(2, shape.layers) if step.way == "offload" else shape.layers)


def _norms(shape: Shape, step: Step) -> float:
    """What norms in float32 keep of a layer: the input, and the result before its weight."""
    if step.in_pieces and step.tokens > NORMS_FROM_PIECES * step.feed_forward:
        return 0
    return shape.norms * step.tokens * shape.hidden * (WIDE + step.dtype.itemsize)


def _saved(shape: Shape, step: Step, whole: bool) -> float:
    """What a layer keeps for its gradients: normed inputs, queries, keys, values, output, the sum and its norm; inner ones if whole."""
    numbers = 3 * shape.hidden + 2 * shape.queries + shape.keys + (2 * shape.inner if whole else 0)
    return step.tokens * (step.dtype.itemsize * numbers + shape.masks) + _norms(shape, step)


def _layer(shape: Shape, step: Step) -> float:
    """A layer in work in the backward pass: while its feed-forward layer is, or its attention."""
    state, each = step.tokens * shape.hidden, step.dtype.itemsize
    whole = not step.in_pieces or step.tokens <= step.feed_forward
    inner = (step.tokens if whole else step.feed_forward) * shape.inner * each
    # gradients of the inner numbers; in pieces those numbers themselves, and sums of the weights' gradients
    work = 1.5 * inner if whole else 3.5 * inner + shape.largest_layer * (WIDE + each)
    feed_forward = _saved(shape, step, whole) + 2 * state * each + work
    rotary = step.tokens * (shape.queries // 16) * each
    attention = step.tokens * each * (2 * shape.hidden + 4 * shape.queries + 2 * shape.keys) + _norms(shape, step) / 2
    found = max(feed_forward, attention) + rotary
    if step.way == "plain":
        # what it keeps is counted with that of all
        found -= _saved(shape, step, whole=True)
    return found


def _logits(shape: Shape, step: Step) -> float:
    """The loss and its gradient."""
    each, state = step.dtype.itemsize, step.tokens * shape.hidden * step.dtype.itemsize
    if not step.in_pieces or step.tokens <= step.logits:
        return 3 * step.tokens * shape.vocabulary * (WIDE if shape.is_decoder else each) + state
    piece = step.logits * shape.vocabulary * (each + 2 * WIDE)
    weight = shape.head * (WIDE + each)
    return piece + weight + 3 * state + (_norms(shape, step) / max(shape.norms, 1))


def _loss(shape: Shape, step: Step) -> dict[str, float]:
    return {**_always(shape, step), "inputs of layers": _kept(shape, step), "logits": _logits(shape, step)}


def _first_layer(shape: Shape, step: Step) -> dict[str, float]:
    """The last layer, with which the backward pass begins: all others still keep what they keep."""
    grads = step.dtype.itemsize * (shape.head + shape.largest_layer)
    of_layers = {"inputs of layers": _kept(shape, step), "a layer in work": _layer(shape, step)}
    return {**_always(shape, step), "gradients": grads, **of_layers}


def _last_layer(shape: Shape, step: Step) -> dict[str, float]:
    """The first layer, with which the backward pass ends: all gradients are there."""
    weights, shares = _shared(shape, step)
    grads = step.dtype.itemsize * (shape.weights / shares + (shape.head if shape.is_tied else 0))
    of_layers = {
        "inputs of layers": _kept(shape, step) / shape.layers, "a layer in work": _layer(shape, step),
    }  # fmt: skip
    return {**_always(shape, step), "gradients": grads, **of_layers}


def _optimizer(shape: Shape, step: Step) -> dict[str, float]:
    own = step.dtype.itemsize * shape.weights / (step.gpus if step.fsdp else 1)
    return {**_always(shape, step), "weights": own, "gradients": own}


def _always(shape: Shape, step: Step) -> dict[str, float]:
    weights, shares = _shared(shape, step)
    states = OPTIMIZERS[step.optimizer] * step.dtype.itemsize * shape.weights / shares
    # ids, labels and positions, of the whole text
    return {"weights": weights, "optimizer": states, "batch": 3 * ID * step.rows * step.length}


MOMENTS: dict[str, Callable[[Shape, Step], dict[str, float]]] = {
    "loss": _loss, "layer": _first_layer, "gradients": _last_layer, "optimizer": _optimizer,
}  # fmt: skip
