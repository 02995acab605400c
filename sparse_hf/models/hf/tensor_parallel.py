"""Tensor parallelism: a rank computes some of a layer's heads, and takes from a pattern what belongs to them.

Whether Transformers distributed the model (`DistributedConfig(tp_size=2)`) or torch's `parallelize_module`, projections are
DTensors whose rows are spread over a mesh, heads in turn.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from ...pattern import Pattern, PerHead


def own_heads(text: str, module: nn.Module, heads: int, total: int) -> str:
    """A layer's pattern, for the `heads` of `total` that this rank computes.

    Args:
        module: the attention module, whose projections say which heads these are.

    Raises:
        ValueError: `per_head(...)`, where nothing says which heads these are.
        NotImplementedError: `lsh(...)`, which draws directions for all heads in turn.
    """
    if heads == total or not _asks_for_heads(text):
        return text
    if "lsh" in text:
        raise NotImplementedError(
            f"{text} draws directions for each of {total} heads, and this rank has {heads}; lsh(...) is not computed with tensor "
            "parallelism: use data parallelism or FSDP"
        )
    sharded = next((found for p in module.parameters() if (found := _rows(p)) is not None), None)
    if sharded is None or heads * sharded[1] != total:
        raise ValueError(
            f"{type(module).__name__} computes {heads} heads of {total}, and its projections are no DTensors that tell which; "
            "per_head(...) needs DistributedConfig(tp_size=...) or torch's parallelize_module"
        )
    return _slice(text, sharded[0] * heads, heads)


def check_division(model: nn.Module) -> None:
    """Raise ValueError where ranks would have to share a head."""
    for name, module in model.named_modules():
        size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
        for child_name, child in module.named_children() if isinstance(size, int) else ():
            weight = getattr(child, "weight", None)
            sharded = _rows(weight)
            if weight is None or sharded is None:
                continue
            heads = weight.shape[0] // size
            if heads % sharded[1]:
                raise ValueError(
                    f"{name}.{child_name} has {heads} heads, which {sharded[1]} ranks cannot share evenly; choose a tp_size that "
                    f"divides {heads}, or use data parallelism or FSDP"
                )


def _rows(parameter) -> tuple[int, int] | None:
    """Of a parameter whose rows are spread for tensor parallelism: this rank's number and how many ranks there are."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    for dim, placement in enumerate(parameter.placements):
        # FSDP, too, spreads rows, of whatever they are: "fsdp", "dp_shard"
        is_data_parallel = mesh.mesh_dim_names is not None and "dp" in mesh.mesh_dim_names[dim]
        if placement == Shard(0) and not is_data_parallel:
            return mesh.get_local_rank(dim), mesh.size(dim)
    return None


# graphs take the answers as constants instead of tracing the parser
@torch.compiler.assume_constant_result
def _asks_for_heads(text: str) -> bool:
    return _cached_asks(text)


@lru_cache(maxsize=256)
def _cached_asks(text: str) -> bool:
    pattern = Pattern.parse(text)
    # choices are each head's own
    return pattern.heads is not None or pattern.uses_content and "lsh" in text


@torch.compiler.assume_constant_result
def _slice(text: str, first: int, count: int) -> str:
    return _cached_slice(text, first, count)


@lru_cache(maxsize=256)
def _cached_slice(text: str, first: int, count: int) -> str:
    pattern = Pattern.parse(text)
    # whoever asks knows that the pattern is one of heads
    return str(PerHead(*(pattern.heads or ())[first : first + count]))
