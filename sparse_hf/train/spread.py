"""Weights that not all processes hold: spread by ZeRO-3, or loaded by one of them."""

from __future__ import annotations

import torch
from torch import distributed, nn
from transformers.distributed.fsdp import is_fsdp_enabled


def is_partitioned(model: nn.Module) -> bool:
    """Did DeepSpeed's ZeRO-3 spread the weights, as it does when a model is made?"""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def receive_weights(model: nn.Module, device: torch.device) -> None:
    """Move a model that is not trained to a device, with the first process's weights.

    Where FSDP has one process load models (`fsdp_cpu_ram_efficient_loading`), from_pretrained of
    Transformers before 5.24 leaves the others zeros, and only the model that is trained gets its
    weights from the first process later.
    """
    model.to(device)
    if not is_fsdp_enabled():
        return
    # by name, so that weights that share memory in some processes are sent as often in all
    for tensor in model.state_dict().values():
        distributed.broadcast(tensor, src=0)
