"""What collators share: features, and per-token columns padded like a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# B rows, L tokens of the longest row, n tokens of one

Feature = dict[str, Any]
Collator = Callable[[Any], Mapping[str, Any]]
"""Features -> batch. Transformers' collators take lists, others any sequence, so that the argument is not spelled out."""


def as_features(features: Sequence[Mapping[str, Any]]) -> list[Feature]:
    """Copies, so that collators may take columns out."""
    for feature in features:
        if not isinstance(feature, Mapping) or "input_ids" not in feature:
            found = sorted(feature) if isinstance(feature, Mapping) else type(feature).__name__
            raise ValueError(f"a feature must be a dictionary with input_ids; found {found}")
    return [dict(feature) for feature in features]


def tokens(feature: Feature) -> Tensor:
    """`input_ids` of one feature, `[n]`."""
    ids = torch.as_tensor(feature["input_ids"])
    if ids.ndim != 1:
        raise ValueError(f"input_ids of a feature have shape {tuple(ids.shape)}; a collator takes rows of tokens, [n]")
    return ids


def real_tokens(feature: Feature) -> Tensor:
    """True where a feature holds no padding of its own, `[n]`."""
    if feature.get("attention_mask") is None:
        return torch.ones_like(tokens(feature), dtype=torch.bool)
    return torch.as_tensor(feature["attention_mask"]).bool()


def padded_like(
    batch: Mapping[str, Any], features: Sequence[Feature], columns: Sequence[Tensor], fill: int = 0
) -> Tensor:
    """Columns of `[n]`, one a feature, as `[B, L]`, padded like the batch.

    Raises:
        ValueError: the batch has other rows than the features, or padding whose side no
            attention_mask shows.
    """
    rows, length = batch["input_ids"].shape
    if rows != len(features):
        raise ValueError(
            f"the inner collator made {rows} rows of {len(features)} features; marks and positions need a row for each "
            "(pack with PackDocuments before collating)"
        )
    out = torch.full((rows, length), fill, dtype=torch.long)
    mask = batch.get("attention_mask")
    for row, (feature, column) in enumerate(zip(features, columns, strict=True)):
        if len(column) > length:
            raise ValueError(
                f"the inner collator cut a row of {len(column)} tokens to {length}; truncate when tokenizing"
            )
        shift = 0
        if len(column) < length:
            if mask is None:
                raise ValueError("the inner collator pads without an attention_mask: on which side it does is unknown")
            # the first real token shows the side of the padding
            shift = int(mask[row].argmax()) - int(real_tokens(feature).int().argmax())
        out[row, shift : shift + len(column)] = column
    return out
