"""Marks: which tokens `marked()` speaks of, from `global_attention_mask` or the ids that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import given_cache
from .config import SparseConfigMixin


class MarkingModel(Protocol):
    """What marks ask of a sparse model."""

    config: SparseConfigMixin
    finds_marks: bool

    def default_marks(self, input_ids: Tensor) -> Tensor | None: ...


def forward_marks(
    model: MarkingModel, input_ids: Tensor | None, given: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The marks of a forward pass, None if there are none.

    Args:
        given: the caller's `global_attention_mask`.
        kwargs: further arguments of `forward`, a cache among them.

    Raises:
        ValueError: marks for a model whose pattern has none, or ids that cannot be found.
    """
    config = model.config
    if not config.uses_marks:
        # heads of dense classes that mark by themselves are kept from it by a mask of no rows
        if given is not None and len(given):
            raise ValueError(f"global_attention_mask was given, but {config.why_no_marks}")
        return None
    if "encoder" in config.stacks or config.heads_mark:
        # marks are the encoder's, which finds those named by id itself
        if getattr(config, "is_decoder", False) or not model.finds_marks:
            return model.default_marks(input_ids) if given is None and input_ids is not None else given
    elif given is None and config.global_token_ids:
        cache = given_cache(kwargs)
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "global_token_ids cannot be found in a cache; pass global_attention_mask for all keys, [batch, cached + new]"
            )
    if given is None and config.global_token_ids and input_ids is None:
        raise ValueError("global_token_ids need input_ids; with inputs_embeds pass global_attention_mask")
    return find_marks(config, input_ids, given)


def generation_marks(config: SparseConfigMixin, input_ids: Tensor, given: Tensor | None) -> Tensor | None:
    """The marks of one step of `generate`, None if the model finds them by itself.

    Here is the whole text so far, of which the model itself sees only the last token. `given` covers the prompt.
    """
    is_asked = given is not None or config.global_token_ids
    if not config.uses_marks or config.is_encoder_decoder or not is_asked:
        return None
    if given is not None and input_ids.shape[1] != given.shape[1]:
        given = torch.nn.functional.pad(given, (0, input_ids.shape[1] - given.shape[1]))
    return find_marks(config, input_ids, given)


def find_marks(config: SparseConfigMixin, input_ids: Tensor | None, given: Tensor | None) -> Tensor | None:
    """Marks given by hand, and the tokens named in the configuration: bool of the shape of what was given."""
    found = None
    if config.global_token_ids and input_ids is not None:
        found = torch.isin(input_ids, torch.tensor(config.global_token_ids, device=input_ids.device))
    if given is None:
        return found
    given = given.bool()
    if found is None:
        return given
    # multiple choice flattens its ids on the way in; with a cache the ids are only the last of the keys
    given = given.reshape(*found.shape[:-1], given.shape[-1])
    return given | torch.nn.functional.pad(found, (given.shape[-1] - found.shape[-1], 0))
