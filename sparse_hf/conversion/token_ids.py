"""Tokens that `marked()` speaks of, by their texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
    return ids_of(asked, partial(_load, source), source.name)


def ids_of(asked: Sequence[int | str], load: Callable[[], Any], name: str) -> tuple[int, ...]:
    """The same by a tokenizer that `load` gives, if there is a text; errors call the checkpoint `name`."""
    tokenizer = load() if any(isinstance(one, str) for one in asked) else None
    return tuple(_id(one, tokenizer, name) if isinstance(one, str) else one for one in asked)


def _load(source: Source) -> Any:
    # without its files, Transformers makes a tokenizer of its own
    if not has_tokenizer(source.carried, source.folder):
        raise ValueError(f"global_token_ids has texts, and {source.name} has no tokenizer that knows them; give ids")
    return AutoTokenizer.from_pretrained(source.folder)


def _id(text: str, tokenizer: Any, name: str) -> int:
    found = tokenizer.convert_tokens_to_ids(text)
    if found is None or (found == tokenizer.unk_token_id and text != tokenizer.unk_token):
        special = ", ".join(map(repr, tokenizer.all_special_tokens))
        raise ValueError(
            f"global_token_ids has {text!r}, which is no token of {name}; its special tokens are {special}"
        )
    return int(found)
