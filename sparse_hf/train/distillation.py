"""What a model learns from a teacher: the terms of the loss and their weights.

Legend: B batch, L tokens of a row, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..attention.autograd import refuse_second_derivative
from ..models.hf.loss import shifts_labels
from .deferred_logits import DeferredLogits, PieceLoss, piece_by_piece

# a label that no loss counts
IGNORED = -100
# answers of teacher and student are compared for this many tokens at a time: T x V is large
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Distillation:
    """What is learned from a teacher, as weights of the terms of the loss.

    All terms are means over the labelled tokens of a step.

    Attributes:
        labels: weight of the model's own loss.
        logits: weight of KL(teacher || student) of the softmax at `temperature`, times its square
            (arXiv:1503.02531).
        temperature: above 1 gives unlikely answers more say.
        hidden: weight of the mean squared difference of hidden states, averaged over layers and
            their width.
        layers: weights of the layers in that average, one for each; by default all alike.

    Examples:
        >>> Distillation(logits=1.0, hidden=0.5).temperature
        2.0
    """

    labels: float = 1.0
    logits: float = 1.0
    temperature: float = 2.0
    hidden: float = 0.0
    layers: Sequence[float] | None = None

    def __post_init__(self):
        weights = {"labels": self.labels, "logits": self.logits, "hidden": self.hidden}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}; a weight of the loss is a number from 0")
        if not any(weights.values()):
            raise ValueError("all weights of the loss are 0; give labels, logits or hidden a weight")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be greater than 0")
        if self.layers is not None and (min(self.layers, default=0) < 0 or not sum(self.layers)):
            raise ValueError(f"layers is {list(self.layers)}; weights of layers are numbers from 0, and not all 0")


def unwrapped(model):
    """The model inside wrappers of torch, accelerate and peft."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shifts(model) -> bool:
    """Does a token's answer belong to the next label, as in a decoder?"""
    return shifts_labels(unwrapped(model))


def labelled(model, labels: Tensor) -> Tensor:
    """True where an answer has a label.

    `[B, L - 1]` of a decoder, whose last answer has none, else `[B, L]`.
    """
    return (labels[:, 1:] if shifts(model) else labels) != IGNORED


class _Divergence(torch.autograd.Function):
    """The sum of KL(teacher || student) over the rows that are kept.

    What autograd would keep, two distributions in float32, is four times what answers take; this
    keeps the gradient in their dtype.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, keep: Tensor, temperature: float) -> Tensor:
        """Answers `[T, V]` of both, and `[T]` bool."""
        total, grad = student.new_zeros((), dtype=torch.float32), torch.zeros_like(student)
        for some, *answers, piece in zip(*(t.split(CHUNK_TOKENS) for t in (keep, student, teacher, grad)), strict=True):
            if not some.any():
                continue
            ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in answers)
            wanted = theirs.exp()
            kl = (wanted * (theirs - ours)).sum(-1)
            total += kl.masked_fill(~some, 0).sum()
            piece.copy_(ours.exp_().sub_(wanted).div_(temperature).masked_fill_(~some[:, None], 0))
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        refuse_second_derivative("the divergence from a teacher")
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None


def _divergence(student: Tensor, teacher: Tensor, keep: Tensor, temperature: float) -> Tensor:
    """`_Divergence`, of answers that are not made yet piece by piece."""
    if not isinstance(student, DeferredLogits) or student.made is not None:
        total = _Divergence.apply(student, teacher, keep, temperature)
        assert isinstance(total, Tensor)
        return total

    def summed(answers: Tensor, rows: Tensor) -> Tensor:
        wanted = teacher.of(rows) if isinstance(teacher, DeferredLogits) else teacher[rows]
        ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (answers, wanted))
        return F.kl_div(ours, theirs, reduction="sum", log_target=True)

    rows = keep.nonzero().squeeze(1)
    return piece_by_piece(student, student.recipe, PieceLoss(summed, rows, 1, torch.float32, torch.is_grad_enabled()))


def distillation_loss(model, outputs, teacher_outputs, labels: Tensor, weights: Distillation) -> Tensor:
    """The teacher's terms, summed over labelled tokens."""
    keep = labelled(model, labels)
    total = torch.zeros((), dtype=torch.float32, device=outputs["logits"].device)
    if weights.logits:
        # a decoder's last answer has no label
        kept = F.pad(keep, (0, labels.shape[1] - keep.shape[1])).flatten()
        ours, theirs = (o["logits"].flatten(0, 1) for o in (outputs, teacher_outputs))
        total = total + weights.logits * weights.temperature**2 * _divergence(ours, theirs, kept, weights.temperature)
    if weights.hidden:
        both = (o["hidden_states"] for o in (outputs, teacher_outputs))
        # the first states are the embeddings
        states = [[s[:, : keep.shape[1]][keep] for s in layers[1:]] for layers in both]  # [T, D]
        layers = weights.layers or [1.0] * len(states[0])
        for weight, student, teacher in zip(layers, *states, strict=True):
            square = F.mse_loss(student.float(), teacher.float(), reduction="none").mean(-1).sum()
            total = total + weights.hidden * weight / sum(layers) * square
    return total


def check_teacher(student, teacher: PreTrainedModel, weights: Distillation) -> None:
    """Refuse a teacher that the student cannot be compared with."""
    ours, theirs = unwrapped(student).config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"the teacher has {theirs.vocab_size} tokens and the model {ours.vocab_size}; they must share them"
        )
    trained = {p.data_ptr() for p in student.parameters() if p.requires_grad}
    if any(p.data_ptr() in trained for p in teacher.parameters()):
        raise ValueError(
            "the teacher shares weights that are trained (sparsify shares them); give sparsify a copy.deepcopy, or load it again"
        )
    if not weights.hidden:
        return
    if ours.is_encoder_decoder:
        raise ValueError("hidden states of an encoder-decoder are not distilled; set hidden=0 and use logits")
    for name in ("hidden_size", "num_hidden_layers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(f"{name} is {getattr(theirs, name)} in the teacher and {getattr(ours, name)} in the model")
    if weights.layers is not None and len(weights.layers) != ours.num_hidden_layers:
        raise ValueError(f"layers has {len(weights.layers)} weights; the model has {ours.num_hidden_layers} layers")
