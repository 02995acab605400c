"""Tensors that are made once and serve later calls, whatever mode those run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


@contextmanager
def lasting() -> Iterator[None]:
    """Make ordinary tensors within: no inference tensors, which training cannot save, and no fake ones."""
    with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
        yield
