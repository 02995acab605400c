"""`sparse-hf show`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .arguments import PATTERN_HELP, numbers
from .info import info_lines, read_info
from .paragraphs import print_lines


def show(
    patterns: Annotated[
        list[str],
        typer.Argument(
            help=f"{PATTERN_HELP} Several are layers in this order, over and over. Or the folder of a sparse checkpoint."
        ),
    ],
    length: Annotated[
        int | None, typer.Option(help="Tokens; by default 4,096, or as many as a checkpoint takes.")
    ] = None,
    num_heads: Annotated[int, typer.Option(help="Query heads, for FLOPs and memory.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Numbers per head, for FLOPs.")] = 64,
    block_size: Annotated[int, typer.Option(help="Tokens per block of the plan.")] = 128,
    marked: Annotated[str, typer.Option(help="Positions that marked() speaks of, like '0,17'.")] = "",
    png: Annotated[Path | None, typer.Option(help="Also draw the pattern to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and no picture.")] = False,
) -> None:
    """Print a pattern as a picture, and its costs beside dense attention.

    Of several patterns, print also what layers reach together. Of a checkpoint, print its patterns, and
    what `sparse-hf info` tells.
    """
    from ..analysis import render, render_stack, save_png

    if len(patterns) == 1 and Path(patterns[0]).is_dir():
        with Console(stderr=True).status("counting pairs"):
            found = read_info(patterns[0], length)
        tokens = int(found["counted_at"])
        patterns = list(dict.fromkeys(part["pattern"] for stack in found["stacks"] for part in stack["patterns"]))
    else:
        found, tokens = None, 4096 if length is None else length
    if png and len(patterns) > 1:
        raise ValueError(f"--png draws one pattern, and there are {len(patterns)}; draw them one by one")
    options = {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "marked": tuple(numbers(marked)),
    }
    if as_json:
        typer.echo(json.dumps(_numbers(patterns, tokens, options) if found is None else found, indent=2))
    else:
        several = len(patterns) > 1 and found is None
        with Console(stderr=True).status("counting pairs"):
            pictures = (
                [render_stack(patterns, tokens, **options)]
                if several
                else [render(p, tokens, **options) for p in patterns]
            )
        Console().print(*pictures, sep="\n")
        if found is not None:
            print_lines(info_lines(found))
    if png:
        save_png(patterns[0], tokens, png, **options)
        Console(stderr=True).print(f"drawn to {png}")


def _numbers(patterns: list[str], length: int, options: dict[str, Any]) -> dict[str, Any]:
    """The numbers of each pattern, and what layers with them in turn reach together."""
    from ..analysis import describe, describe_stack

    shared = {key: options[key] for key in ("block_size", "marked")}
    each = [asdict(describe(pattern, length, **options)) for pattern in patterns]
    return {"patterns": each, "together": asdict(describe_stack(patterns, length, **shared))}
