"""`sparse-hf show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .arguments import PATTERN_HELP, numbers


def show(
    patterns: Annotated[
        list[str], typer.Argument(help=f"{PATTERN_HELP} Several are layers in this order, over and over.")
    ],
    length: Annotated[int, typer.Option(help="Tokens.")] = 4096,
    num_heads: Annotated[int, typer.Option(help="Query heads, for FLOPs and memory.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Numbers per head, for FLOPs.")] = 64,
    block_size: Annotated[int, typer.Option(help="Tokens per block of the plan.")] = 128,
    marked: Annotated[str, typer.Option(help="Positions that marked() speaks of, like '0,17'.")] = "",
    png: Annotated[Path | None, typer.Option(help="Also draw the pattern to this file.")] = None,
) -> None:
    """Print a pattern as a picture, and its costs beside dense attention.

    Of several patterns, print also what layers reach together.
    """
    from ..analysis import render, render_stack, save_png

    if png and len(patterns) > 1:
        raise ValueError(f"--png draws one pattern, and there are {len(patterns)}; draw them one by one")

    options = {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "marked": tuple(numbers(marked)),
    }
    several = len(patterns) > 1
    Console().print(render_stack(patterns, length, **options) if several else render(patterns[0], length, **options))
    if png:
        save_png(patterns[0], length, png, **options)
        Console(stderr=True).print(f"drawn to {png}")
