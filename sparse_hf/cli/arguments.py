"""Texts of the command line that several commands share, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path

OUT_HELP = "Write the figures to this JSON file; in a folder, to MACHINE/DATE-BENCHMARK.json."
TOKENS_HELP = "Tokens that marked() speaks of, ids or texts, like '101,102' or '[CLS],[SEP]'."
PATTERN_HELP = "A pattern, like 'window(256, 256) | first(1)', or a recipe, like 'longformer(attention_window=512)'."


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    return [_number(word) for word in words(text)]


def read_tokens(text: str) -> list[int | str]:
    """Ids of tokens, and texts of others: "101,[SEP]"."""
    return [int(word) if word.isdecimal() else word for word in words(text)]


def read_folder(text: str, *, weights: bool = True, tokenizer: bool = False) -> str:
    """A checkpoint's folder, whose files are whole, or what may be a hub id.

    Args:
        text: what the user gave.
        weights: a folder without them is refused.
        tokenizer: so is one without a tokenizer.

    Raises:
        FileNotFoundError: a path that leads to no checkpoint, or a file that is missing in it. Of a hub id the hub knows.
        ValueError: a damaged file.
    """
    path = Path(text)
    is_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if path.is_file():
        raise ValueError(f"{text} is a file; give the folder of a checkpoint")
    if is_path and not path.is_dir():
        raise FileNotFoundError(f"{text} is no folder with a checkpoint")
    if path.is_dir():
        from ..conversion.source import check_folder

        check_folder(path, weights=weights, tokenizer=tokenizer)
    return text


def read_layers(text: str | None) -> str | None:
    """What `--layers` says, or the file that `tune` wrote.

    Raises:
        ValueError: a file that says no layers.
    """
    return _tuned(text)["layers"] if text is not None and text.endswith(".json") else text


def read_pattern(pattern: str | None, layers: str | None) -> str | None:
    """What `--pattern` says, or, if it says nothing, the file that `tune` wrote and `--layers` names."""
    return (
        _tuned(layers).get("pattern")
        if pattern is None and layers is not None and layers.endswith(".json")
        else pattern
    )


def _tuned(text: str) -> dict[str, str]:
    """The content of `layers.json`."""
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {text}; --layers takes layers.json of sparse-hf tune, or ranges like '0-3=dense'"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{text} says no layers; --layers takes layers.json of sparse-hf tune") from error
    return found


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


def read_cases(text: str) -> tuple[tuple[str, int], ...]:
    """A name and tokens of each: "1b:65536,bert:4096" is (("1b", 65536), ("bert", 4096))."""
    found = []
    for word in words(text):
        name, _, tokens = word.partition(":")
        if not tokens:
            raise ValueError(f"{word!r} has no tokens; write them behind a colon, like '1b:65536'")
        found.append((name, _number(tokens)))
    return tuple(found)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None
