"""Texts of the command line that several commands share, and how they are read."""

from __future__ import annotations

OUT_HELP = "Write the figures to this JSON file; in a folder, to MACHINE/DATE-BENCHMARK.json."
PATTERN_HELP = "A pattern, like 'window(256, 256) | first(1)', or a recipe, like 'longformer(attention_window=512)'."


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    return [_number(word) for word in words(text)]


def read_lengths(text: str) -> list[int]:
    found = numbers(text)
    if not found:
        raise ValueError("--lengths is empty; give numbers of tokens, like '4096,16384'")
    return found


def read_contexts(text: str) -> tuple[tuple[int, int], ...]:
    """Tokens and rows of each: "4096,32768x8" is ((4096, 1), (32768, 8))."""
    found = []
    for word in words(text):
        tokens, _, rows = word.partition("x")
        found.append((_number(tokens), _number(rows or "1")))
    return tuple(found)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None
