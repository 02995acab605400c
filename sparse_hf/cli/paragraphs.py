"""Lines of text that fit the terminal: what does not fit goes on below, indented, and no name is cut."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from textwrap import fill

from rich.console import Console

# what is left for text where names stand beside it on a narrow screen
LEAST_WIDTH = 20


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, each with what does not fit below it, two columns farther in."""
    console = Console(highlight=False)
    for line in lines:
        print_hanging(console, line, len(line) - len(line.lstrip()) + 2)


def wrap_warnings() -> None:
    """Have warnings of this package go on below where they do not fit a terminal."""
    # what Python prints warnings with where nobody asked for another way
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Wrapped())


class _Wrapped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told, console = super().format(record), Console(stderr=True)
        if not console.is_terminal:
            return told
        return fill(told, console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def print_hanging(console: Console, text: str, indent: int) -> None:
    """Print a paragraph whose lines but the first are indented."""
    line, width = "", max(console.width, indent + LEAST_WIDTH)
    # each word with the blanks before it
    for word in re.findall(r" *\S+", text):
        if line.strip() and len(line) + len(word) > width:
            console.print(line, markup=False, soft_wrap=True)
            line, word = " " * indent, word.lstrip()
        line += word
    console.print(line, markup=False, soft_wrap=True)
