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


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a kernel's program may have; of a CPU, where kernels are interpreted, more than any takes."""
    if device.type != "cuda":
        return 1 << 30
    # what every GPU has, where torch does not say
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10)
