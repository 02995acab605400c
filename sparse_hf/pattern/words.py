"""The words of the text form: what a text may call by name. Patterns and recipes enter themselves."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

# gives a pattern for its arguments: a class of patterns, or a recipe
Maker = Callable[..., Any]
_Recipe = TypeVar("_Recipe", bound=Maker)
_WORDS: dict[str, Maker] = {}
# read only; `register` writes
WORDS: Mapping[str, Maker] = MappingProxyType(_WORDS)
# how often a definition has replaced an earlier one: texts that were read before may mean something else then
_replaced = 0


def register(word: str, maker: Maker) -> None:
    """Let texts call `maker` by `word`. A definition that is run again, as in a notebook, replaces itself.

    Raises:
        ValueError: the word is no name, or belongs to something else.
    """
    if not word.isidentifier() or keyword.iskeyword(word):
        raise ValueError(f"{_origin(maker)}: word is {word!r}; it must be a name, like 'every_nth'")
    known = _WORDS.get(word)
    if known is not None and _origin(known) != _origin(maker):
        raise ValueError(f"the word {word!r} belongs to {_origin(known)}; give {_origin(maker)} another `word`")
    global _replaced
    _replaced += known is not None
    _WORDS[word] = maker


def edition() -> int:
    """A number that changes whenever a known word gets another meaning."""
    return _replaced


def recipe(function: _Recipe) -> _Recipe:
    """Decorate a function that gives a pattern, so that texts may call it by its name."""
    register(function.__name__, function)
    return function


def snake_case(name: str) -> str:
    """`EveryNth` -> `every_nth`, `LSHChunks` -> `lsh_chunks`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).strip("_").lower()


def _origin(maker: Maker) -> str:
    return f"{maker.__module__}.{maker.__qualname__}"
