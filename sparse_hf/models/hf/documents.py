"""Packed documents: where the positions of a row begin anew.

Legend: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import logging

from ...attention.written_out import running_max, running_min

logger = logging.get_logger(__name__)


def number_documents(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """The number of each token's document from 0, `[B, N]`: one begins where positions of real tokens begin anew.

    They do where they fall back to the lowest of the row so far, or below it. Branches of a tree of tokens fall back less
    far and begin nothing. A token that repeats the lowest position ends a document of one token, unless the row repeats
    others too, or nothing else: then it repeats them on purpose.

    Args:
        position_ids: `[B or 1, N]`.
        real: `[B, N]` bool, true on real tokens; None if all are.
    """
    here, counts = position_ids[:, 1:], None
    if real is None:
        previous, lowest = position_ids[:, :-1], running_min(position_ids)[:, :-1]
    else:
        position_ids = position_ids.expand_as(real)
        here = position_ids[:, 1:]
        # padding repeats positions, so that the last real token before counts, if there is one
        index = torch.arange(real.shape[1], device=real.device).expand_as(real)
        last_real = running_max(torch.where(real, index, -1))[:, :-1]
        counts = real[:, 1:] & (last_real >= 0)
        previous = position_ids.gather(1, last_real.clamp(min=0))
        beyond = torch.iinfo(torch.long).max
        lowest = running_min(torch.where(real, position_ids.long(), beyond))[:, :-1]
    falls, repeats, is_lowest = here < previous, here == previous, here <= lowest
    if counts is not None:
        falls, repeats = falls & counts, repeats & counts
    grows = here > previous
    packs = ~(repeats & ~is_lowest).any(1, keepdim=True) & (grows if counts is None else grows & counts).any(
        1, keepdim=True
    )
    begins = is_lowest & (falls | repeats & packs)
    return pad(begins.long().cumsum(1), (1, 0))


# by what name FlashAttention's bounds of documents come, `[documents + 1]`
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")


def check_bounds(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse `cu_seq_lens` without `position_ids` where positions would run on from document to document.

    Rotary ones may: they tell distances alone.

    Raises:
        ValueError: a model with a table of positions, or one with two texts, of which they would both be.
    """
    if all(given.get(name) is None for name in BOUNDS):
        return
    scheme = config.positions
    if config.is_encoder_decoder:
        raise ValueError(
            f"cu_seq_lens were given, and {config.model_type} has two texts; give it one text to a row, padded"
        )
    if scheme is not None and scheme.has_table and given.get("position_ids") is None:
        raise ValueError(
            f"cu_seq_lens were given without position_ids, so that the positions of {config.model_type} would run on from document to "
            "document; pass position_ids too, which begin anew with each"
        )


def warn_of_mixing(config: Any) -> None:
    """Say once that documents of a row reach each other through layers that are no attention, as they do in Transformers."""
    convolves = isinstance(size := getattr(config, "conv_kernel_size", 0), int) and size > 0
    attending, layers = getattr(config, "attention_layers", None), sum(config.stacks.values())
    if convolves or attending is not None and len(attending) < layers:
        what = "a convolution" if convolves else "layers of another kind than attention"
        logger.warning_once(
            f"documents that share a row are kept apart by attention, and {config.model_type} mixes them by {what}, as its dense "
            "class does; give each document a row of its own"
        )


def documents_of_bounds(bounds: Tensor, length: int) -> Tensor:
    """The number of each token's document, `[1, N]`, from `cu_seq_lens`: where documents begin, and the end of the last."""
    index = torch.arange(length, device=bounds.device)
    return torch.searchsorted(bounds.long(), index, right=True)[None] - 1
