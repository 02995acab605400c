"""Tokens that `marked()` speaks of, by their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from .carry import has_tokenizer
from .source import Source


def token_ids(asked: Sequence[int | str], source: Source) -> tuple[int, ...]:
    """The ids of tokens that are given as ids or as texts, like "[CLS]".

    Args:
        asked: ids and texts.
        source: where the tokenizer is; without texts nothing is loaded.

    Raises:
        ValueError: a text that is no token, or no tokenizer that could tell.
    """
    if not any(isinstance(one, str) for one in asked):
        return tuple(one for one in asked if not isinstance(one, str))
    # without its files, Transformers makes a tokenizer of its own
    if not has_tokenizer(source.carried, source.folder):
        raise ValueError(f"global_token_ids has texts, and {source.name} has no tokenizer that knows them; give ids")
    tokenizer: Any = AutoTokenizer.from_pretrained(source.folder)
    return tuple(_id(one, tokenizer, source.name) if isinstance(one, str) else one for one in asked)


def _id(text: str, tokenizer: Any, name: str) -> int:
    found = tokenizer.convert_tokens_to_ids(text)
    if found is None or (found == tokenizer.unk_token_id and text != tokenizer.unk_token):
        special = ", ".join(map(repr, tokenizer.all_special_tokens))
        raise ValueError(
            f"global_token_ids has {text!r}, which is no token of {name}; its special tokens are {special}"
        )
    return int(found)
