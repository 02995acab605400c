"""A user's mistake as one line: errors of the package speak of arguments, and the command line has flags."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, get_type_hints

from safetensors import SafetensorError
from typer.models import OptionInfo

# what is a mistake of the user's, or of the folder, the file or the network that the user named
MISTAKES = (ValueError, OSError, ImportError, NotImplementedError, SafetensorError)


def one_line(error: Exception) -> str:
    """What an error says, on one line: its first paragraph. A pattern with its mark below what is wrong stays as it is."""
    message = str(error)
    has_mark = any(line.strip() == "^" for line in message.splitlines())
    return message if has_mark else " ".join(message.split("\n\n")[0].split())


def by_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors name its flags: `overwrite=True` is --overwrite."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except MISTAKES as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (name_flags(error.args[0], flags(command)),)
            raise

    return run


def flags(command: Callable[..., None]) -> dict[str, str]:
    """The flag of each option, by the name of its argument."""
    hints = get_type_hints(command, include_extras=True)
    found = {}
    for name in inspect.signature(command).parameters:
        for note in getattr(hints[name], "__metadata__", ()):
            if isinstance(note, OptionInfo):
                # in a note, typer takes the first name that is given for a default
                given = [one for one in (note.default, *(note.param_decls or ())) if str(one).startswith("--")]
                found[name] = given[0] if given else f"--{name.replace('_', '-')}"
    return found


def name_flags(message: str, flags: dict[str, str]) -> str:
    """A message in which arguments are called by their flags.

    Words that are also plain English are taken for arguments where the sentence is about one: at its beginning, and in "leave rope
    out".
    """
    for name, flag in flags.items():
        message = re.sub(rf"\b{name}=True\b", flag, message)
        message = re.sub(rf"^{name}(?= (?:is|has|holds|names|needs?|hold)\b|:)", flag, message)
        message = re.sub(rf"(?<=leave ){name}(?= (?:out|alone)\b)", flag, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w.`'-]){name}\b(?![\w`'(])", flag, message)
        message = message.replace(f"{flag} ({flag})", flag)
    return message
