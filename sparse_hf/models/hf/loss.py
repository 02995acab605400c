"""Loss: a head's mean over its batch becomes its share of the optimizer step's mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def at_least_one(num_items_in_batch: Tensor | int) -> Tensor:
    """The number of labels of a step, 1 if there are none: such a step has a loss of 0 instead of NaN."""
    return torch.as_tensor(num_items_in_batch).clamp(min=1)


def shifts_labels(model: Any) -> bool:
    """Does a token's answer belong to the next label, as in a decoder?

    Classes whose name says nothing of their loss (`GPT2LMHeadModel`) have that of decoders, if they call the library's.
    """
    # decoders of encoder-decoders take labels as they are
    if model.config.is_encoder_decoder:
        return False
    return model.loss_type == "ForCausalLM" or (model.loss_type is None and model.can_generate())


def rescaled(model: Any, output: Any, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Any:
    """Turn the mean over this batch's labels into its share of the mean over all labels of the optimizer step.

    Trainer passes their number and then neither divides by accumulation steps nor averages over processes, so that a head
    that keeps the plain mean would train with a loss that is too large by both. In training, a batch without labels has no
    share: its loss is 0 instead of the mean of nothing (NaN), with a graph behind it, which other processes wait for.

    Args:
        model: a `SparseMixin` head.
        output: what its parent's `forward` returned, a tuple or a `ModelOutput`.
        num_items_in_batch: labels of the whole step, None outside Trainer.
    """
    is_share = num_items_in_batch is not None
    if is_share and model._parent_scales_loss or not (is_share or model.training):
        return output
    # those of encoder-decoders compute their loss by themselves
    shifts = model._parent_scales_loss and shifts_labels(model)
    count = ((labels[..., 1:] if shifts else labels) != -100).sum()
    loss = output[0] if isinstance(output, tuple) else output.loss
    loss = torch.where(count > 0, loss, 0)
    if is_share:
        loss = loss * (count / torch.as_tensor(num_items_in_batch, device=count.device))
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output
