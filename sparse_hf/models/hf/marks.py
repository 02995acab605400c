"""Marks: which tokens `marked()` speaks of, from `global_attention_mask` or the ids that the configuration names."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import logging

from .cache import cached_tokens, given_cache, new_tokens, text_length
from .config import SparseConfigMixin
from .streaming_cache import StreamingCache

logger = logging.get_logger(__name__)

# where a cache keeps the marks of its tokens, for passes that give new tokens only
REMEMBERED = "_sparse_hf_marks"
# arguments of a model in `generate` that have a row for each text
ROWS = ("global_attention_mask", "attention_mask", "position_ids", "inputs_embeds")


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
    marks_encoder = "encoder" in config.stacks or config.heads_mark
    # marks are the encoder's, which finds those named by id itself
    if marks_encoder and (getattr(config, "is_decoder", False) or not model.finds_marks):
        return model.default_marks(input_ids) if given is None and input_ids is not None else given
    if given is None and config.global_token_ids and input_ids is None:
        raise ValueError("global_token_ids need input_ids; with inputs_embeds pass global_attention_mask")
    cache = None if marks_encoder else given_cache(kwargs)
    if isinstance(cache, StreamingCache):
        return _marks_of_new(config, cache, given, kwargs)
    found = find_marks(config, input_ids, given) if cache is None else _marks_behind(config, cache, given, kwargs)
    if found is None:
        _warn_of_none(config)
    return found


def _marks_of_new(
    config: SparseConfigMixin, cache: StreamingCache, given: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The marks of new tokens `[B, Q]`; a streaming cache keeps those of others itself.

    `given` covers the new tokens, or all.
    """
    tokens = new_tokens(kwargs)
    if tokens is None:
        return None
    new = tokens.shape[1]
    if not torch.compiler.is_compiling():
        seen = cached_tokens(cache)
        if given is not None and given.shape[-1] not in (new, seen + new):
            raise ValueError(
                f"global_attention_mask has shape {tuple(given.shape)}; with a StreamingCache it must cover the {new} new tokens, or all "
                f"{seen + new}"
            )
        if given is None and not config.global_token_ids and not seen:
            _warn_of_none(config)
    return find_marks(config, kwargs.get("input_ids"), None if given is None else given[:, -new:])


def _warn_of_none(config: SparseConfigMixin) -> None:
    # families whose heads mark by themselves do without marks in others
    needs_none = config.sparse_attention is None or config.heads_mark
    if needs_none or torch.compiler.is_compiling() or (config.marks_are_optional and _is_implied(config)):
        return
    logger.warning_once(
        f"a pattern of this {config.model_type} model has marked(), and nothing is marked, so that it holds no more than the rest of "
        "the pattern: pass global_attention_mask, name global_token_ids when the pattern is given, or write first(1) for the first token"
    )


def _is_implied(config: SparseConfigMixin) -> bool:
    """Is the pattern, by that of the first layer, what the family's own configuration implies?"""
    stack = next(iter(config.stacks))
    return config.layer_patterns(stack)[0] == config.implied_pattern(stack, 0)


def _marks_behind(
    config: SparseConfigMixin, cache: Cache, given: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The marks of all tokens, those in a cache included, which is to remember them.

    `given` covers all tokens, or the new ones where the cache remembers the others.
    """
    tokens = new_tokens(kwargs)
    if torch.compiler.is_compiling() or tokens is None:
        return find_marks(config, kwargs.get("input_ids"), given)
    (rows, new), past = tokens.shape[:2], cached_tokens(cache)
    before = marks_in_cache(cache, rows, past)
    if past and config.global_token_ids and given is None and before is None:
        raise ValueError(
            "global_token_ids cannot be found in a cache; pass global_attention_mask for all keys, [batch, cached + new]"
        )
    if past and before is not None and (given is None or given.shape[-1] == new):
        of_new = torch.zeros(rows, new, dtype=torch.bool, device=before.device) if given is None else given.bool()
        given = torch.cat((before, of_new.to(before.device)), 1)
    found = find_marks(config, kwargs.get("input_ids"), given)
    if found is not None and found.shape[-1] == past + new:
        vars(cache)[REMEMBERED] = found
    return found


def remember_marks(output: Any, marks: Tensor) -> None:
    """Have the cache that a forward pass has made remember the marks of its tokens."""
    if torch.compiler.is_compiling() or not isinstance(output, Mapping) or marks.ndim != 2:
        return
    cache = given_cache(output)
    if cache is not None:
        vars(cache)[REMEMBERED] = marks.bool()


def marks_in_cache(cache: Cache | None, rows: int, past: int) -> Tensor | None:
    """The marks that a cache remembers of its `past` tokens, `[rows, past]`; None if it remembers none."""
    found: Tensor | None = None if cache is None else vars(cache).get(REMEMBERED)
    if found is None or not past or found.shape[1] < past or rows % len(found):
        return None
    # a cache that was repeated for several continuations of a text
    return found[:, :past].repeat_interleave(rows // len(found), 0)


def generation_marks(
    config: SparseConfigMixin, input_ids: Tensor, given: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The marks of one step of `generate`, None if the model finds them by itself.

    Args:
        input_ids: the text so far, without what only a cache holds; or a piece of it, where a prompt is taken in pieces.
        given: `global_attention_mask` of the prompt.
        kwargs: further arguments of `prepare_inputs_for_generation`.
    """
    if not config.uses_marks or config.is_encoder_decoder or (given is None and not config.global_token_ids):
        return None
    length = text_length(input_ids, kwargs)
    if given is None and length > input_ids.shape[1]:
        # marks of what is hidden in the cache are known to that alone
        return None
    if given is not None:
        # of the end of a prompt that is taken in pieces nothing is said yet; what was generated is marked by its ids alone
        given = torch.nn.functional.pad(given[:, :length], (0, max(0, length - given.shape[1])))
        hidden = length - input_ids.shape[1]
        before = marks_in_cache(given_cache(kwargs), len(input_ids), hidden) if config.global_token_ids else None
        if before is not None:
            given = given.bool() | torch.nn.functional.pad(before.to(given.device), (0, length - hidden))
    return find_marks(config, input_ids, given)


def step_marks(
    config: SparseConfigMixin, input_ids: Tensor, given: Mapping[str, Any], inputs: Mapping[str, Any]
) -> Tensor | None:
    """The marks of the new tokens of one step of `generate` `[B, Q]`, for which a streaming cache is to have room; None if there are none.

    Args:
        input_ids: the text so far, without what only a cache holds; or a piece of it, where a prompt is taken in pieces.
        given: arguments of `prepare_inputs_for_generation`, with `global_attention_mask` of the prompt.
        inputs: of `forward`.

    Raises:
        ValueError: a marked token would see keys that were dropped.
    """
    cache, tokens, marks = given_cache(inputs), new_tokens(inputs), given.get("global_attention_mask")
    if not config.uses_marks or not isinstance(cache, StreamingCache) or tokens is None:
        return None
    new, length = tokens.shape[1], text_length(input_ids, given)
    seen = length - new
    # what was generated is marked by its ids alone
    of_prompt = None if marks is None or marks.shape[1] <= seen else marks[:, seen:length]
    if of_prompt is not None:
        of_prompt = torch.nn.functional.pad(of_prompt, (0, new - of_prompt.shape[1]))
    found = find_marks(config, inputs.get("input_ids"), of_prompt)
    cache.expect_marks(found, seen)
    return found


def prompt_length(generation_config: Any, kwargs: Mapping[str, Any]) -> int | None:
    """Tokens of the prompt in `generate`, those in a cache included; None if nothing says so.

    A mask of ones is dropped there, and its length kept.
    """
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        return mask.shape[1]
    length = getattr(generation_config, "_mask_length", None)
    return length if length is not None or positions is None else positions.shape[-1]


def whole_marks(
    config: SparseConfigMixin, kwargs: Mapping[str, Any], prompt: int | None, assists: bool = False
) -> Tensor | None:
    """The `global_attention_mask` of a prompt with what its beginning in a cache has marked; None if nothing is marked.

    Args:
        kwargs: of the model in `generate`, with a cache among them.
        prompt: tokens of the prompt, those in the cache included; None if that is not known.
        assists: an assistant's prompt grows from round to round, and its marks are those of the first one.

    Raises:
        ValueError: marks of another length than the prompt's, or than its new tokens'.
    """
    given, cache = kwargs.get("global_attention_mask"), given_cache(kwargs)
    if not config.uses_marks or config.is_encoder_decoder or prompt is None:
        return given
    if assists and given is not None:
        given = torch.nn.functional.pad(given, (0, max(0, prompt - given.shape[1])))
    past = cached_tokens(cache)
    is_whole = given is not None and given.shape[1] == prompt
    if not past or is_whole and not config.global_token_ids or given is None and not config.global_token_ids:
        return given
    rows = next((len(kwargs[name]) for name in ROWS if isinstance(kwargs.get(name), Tensor)), 0)
    before = marks_in_cache(cache, rows, past)
    if isinstance(cache, StreamingCache) and given is not None:
        # it knows the marks of its tokens itself
        before = torch.zeros(rows, past, dtype=torch.bool, device=given.device)
    if before is None or (given is not None and not is_whole and given.shape[1] != prompt - past):
        if given is None or is_whole:
            return given
        raise ValueError(
            f"global_attention_mask has shape {tuple(given.shape)}; it must cover all {prompt} tokens of the prompt, those in the cache "
            "included"
        )
    of_cache = torch.nn.functional.pad(before, (0, prompt - past))
    if given is None:
        return of_cache
    return of_cache | torch.nn.functional.pad(given.bool().to(before.device), (prompt - given.shape[1], 0))


@lru_cache(maxsize=512)
def is_misspelt(name: str) -> bool:
    """Is an argument meant for `global_attention_mask`? Dense classes take any name and forget it."""
    if name == "global_attention_mask":
        return False
    return any(SequenceMatcher(None, word, "global").ratio() > 0.8 for word in name.lower().split("_"))


def check_spelling(names: Iterable[str], known: Container[str]) -> None:
    """Raise ValueError if an argument of `forward` is a misspelt `global_attention_mask`."""
    wrong = [name for name in names if name not in known and is_misspelt(name)]
    if wrong:
        raise ValueError(f"forward has no argument {wrong[0]!r}; tokens are marked by global_attention_mask")


def find_marks(config: SparseConfigMixin, input_ids: Tensor | None, given: Tensor | None) -> Tensor | None:
    """Marks given by hand, and the tokens named in the configuration: bool of the shape of what was given."""
    found = None
    if config.global_token_ids and input_ids is not None:
        found = (input_ids[..., None] == torch.tensor(config.global_token_ids, device=input_ids.device)).any(-1)
    if given is None:
        return found
    given = given.bool()
    if found is None:
        return given
    # multiple choice flattens its ids on the way in; with a cache the ids are only the last of the keys
    given = given.reshape(*found.shape[:-1], given.shape[-1])
    return given | torch.nn.functional.pad(found, (given.shape[-1] - found.shape[-1], 0))
