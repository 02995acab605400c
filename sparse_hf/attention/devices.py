"""What GPUs can do, and what their kernels take."""

from __future__ import annotations

from functools import lru_cache

import torch

# what tensor cores take as it is
HALF_TYPES = (torch.bfloat16, torch.float16)


def is_autocast(t: torch.Tensor) -> bool:
    """Does autocast choose the dtype of operations on such a tensor? Devices without autocast are never asked."""
    # torch 2.11 cannot trace `torch.amp.is_autocast_available`
    return not t.is_meta and torch.is_autocast_enabled(t.device.type)


# asked with every call, and torch is slow to answer
@lru_cache
def generation(device: torch.device) -> int:
    """The first number of the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)[0]
