"""What GPUs can do, and what their kernels take."""

from __future__ import annotations

from functools import lru_cache

import torch

# what tensor cores take as it is
HALF_TYPES = (torch.bfloat16, torch.float16)


# asked with every call, and torch is slow to answer
@lru_cache
def generation(device: torch.device) -> int:
    """The first number of the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)[0]
