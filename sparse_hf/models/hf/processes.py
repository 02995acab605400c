"""Training on several processes: all of them wait for a gradient of every parameter from each."""

from __future__ import annotations

import torch
from torch import nn


def owes_gradients(module: nn.Module) -> bool:
    """Do other processes wait for gradients of a module, also of what this batch does not use?"""
    distributed = torch.distributed
    if not (module.training and torch.is_grad_enabled() and distributed.is_available()):
        return False
    return distributed.is_initialized() and distributed.get_world_size() > 1
