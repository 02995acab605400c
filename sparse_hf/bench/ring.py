"""Torch's own context parallelism: dense attention over a ring of processes.

Its kernels are those of GPUs, and it takes as many key heads as query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

# what `attn_implementation` calls it
NAME = "bench_ring"
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    # torch replaces the function where `context_parallel` is on, so that it is looked up here
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Causal, and nothing is padded."""


def register_ring() -> None:
    """Make the ring known to Transformers, as `NAME`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def in_ring(mesh: DeviceMesh, kernel: str, rotation: str, tensors: list[Tensor]) -> Iterator[None]:
    """Attention goes round a ring, and tensors `[B, N]` are cut in place to what this process has of them."""
    set_rotate_method(rotation)
    ring = context_parallel(mesh, buffers=tensors, buffer_seq_dims=[1] * len(tensors), no_restore_buffers=set(tensors))
    with sdpa_kernel(KERNELS[kernel]), ring:
        yield


def ring_step(model: PreTrainedModel, batch: dict[str, Tensor], mesh: DeviceMesh, kernel: str, rotation: str) -> Tensor:
    """A training step of a dense decoder whose attention is `NAME`; the mean loss of all processes."""
    model.zero_grad(set_to_none=True)
    ids = batch["input_ids"].clone()
    # the next token's label stands with each token, since neighbours are with other processes
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    counted = (labels != -100).sum()
    with in_ring(mesh, kernel, rotation, [ids, labels, positions]):
        loss = model(
            input_ids=ids, position_ids=positions, labels=labels, shift_labels=labels, num_items_in_batch=counted
        ).loss
        # a share of the whole, so that the mean over processes is that of all
        (loss * mesh.size()).backward()
    loss = loss.detach()
    for value in (loss, *(p.grad for p in model.parameters() if p.grad is not None)):
        dist.all_reduce(value, group=mesh.get_group())
        if value is not loss:
            value.div_(mesh.size())
    return loss
