"""Lines of text that fit the terminal: what does not fit goes on below, indented, and no name is cut."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

# what is left for text where names stand beside it on a narrow screen
LEAST_WIDTH = 20


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, each with what does not fit below it, two columns farther in."""
    console = Console(highlight=False)
    for line in lines:
        print_hanging(console, line, len(line) - len(line.lstrip()) + 2)


def print_hanging(console: Console, text: str, indent: int) -> None:
    """Print a paragraph whose lines but the first are indented."""
    lines, begin = [""], text[:indent]
    for word in text[indent:].split(" "):
        if lines[-1] and len(lines[-1]) + len(word) + 1 > max(LEAST_WIDTH, console.width - indent):
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    for number, line in enumerate(lines):
        console.print((begin if number == 0 else " " * indent) + line, markup=False, soft_wrap=True)
