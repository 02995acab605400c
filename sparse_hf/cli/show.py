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
    num_heads: Annotated[
        int | None, typer.Option(help="Query heads, for FLOPs and memory; by default 12, or those of a checkpoint.")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Numbers per head, for FLOPs; by default 64, or those of a checkpoint.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block of the plan.")] = 128,
    marked: Annotated[str, typer.Option(help="Positions that marked() speaks of, like '0,17'.")] = "",
    causal: Annotated[
        bool, typer.Option("--causal", help="Of a decoder, which computes the pairs that look back; checkpoints know.")
    ] = False,
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
        parts = [(part["pattern"], stack["is_causal"]) for stack in found["stacks"] for part in stack["patterns"]]
        drawn = list(dict.fromkeys(parts))
    else:
        found, tokens = None, 4096 if length is None else length
        drawn = [(pattern, causal) for pattern in patterns]
        _check_folder(patterns)
    if png and len(drawn) > 1:
        raise ValueError(f"--png draws one pattern, and there are {len(drawn)}; draw them one by one")
    known = {"num_heads": 12, "head_dim": 64} if found is None else found
    options = {
        "num_heads": known["num_heads"] if num_heads is None else num_heads,
        "head_dim": known["head_dim"] if head_dim is None else head_dim,
        "block_size": block_size,
        "marked": tuple(numbers(marked)),
    }
    if as_json:
        typer.echo(
            json.dumps(
                _numbers(patterns, tokens, {**options, "is_causal": causal}) if found is None else found, indent=2
            )
        )
    else:
        several = len(patterns) > 1 and found is None
        with Console(stderr=True).status("counting pairs"):
            pictures = (
                [render_stack(patterns, tokens, is_causal=causal, **options)]
                if several
                else [render(p, tokens, is_causal=past, **options) for p, past in drawn]
            )
        Console().print(*pictures, sep="\n")
        if found is not None:
            print_lines(info_lines(found))
    if png:
        save_png(drawn[0][0], tokens, png, is_causal=drawn[0][1], **options)
        Console(stderr=True).print(f"drawn to {png}")


def _check_folder(patterns: list[str]) -> None:
    """Raise ValueError for the name of a folder that is not there, which no pattern looks like."""
    from ..analysis import describe

    if len(patterns) > 1 or "(" in patterns[0]:
        return
    try:
        describe(patterns[0], 1)
    except ValueError:
        raise ValueError(
            f"{patterns[0]!r} is no folder here, and no pattern like 'window(255, 0) | first(4)'; `sparse-hf convert` writes folders"
        ) from None


def _numbers(patterns: list[str], length: int, options: dict[str, Any]) -> dict[str, Any]:
    """The numbers of each pattern, and what layers with them in turn reach together."""
    from ..analysis import describe, describe_stack

    shared = {key: options[key] for key in ("block_size", "marked", "is_causal")}
    each = [asdict(describe(pattern, length, **options)) for pattern in patterns]
    return {"patterns": each, "together": asdict(describe_stack(patterns, length, **shared))}
