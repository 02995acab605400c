"""Where `generate` learns a token late whether a text has ended: on devices that compute while the host goes on."""

from __future__ import annotations

import torch

DEVICES = ("cuda", "xpu")
# tokens that it takes back then
LATE = 1


def late_tokens(device: torch.device) -> int:
    """How many tokens `generate` may take back by itself on a device; none where each token is waited for."""
    return LATE if device.type in DEVICES else 0
