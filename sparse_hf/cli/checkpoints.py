"""`sparse-hf convert`, `export` and `card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import PATTERN_HELP, numbers


def convert(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    pattern: Annotated[
        str | None, typer.Option(help=f"{PATTERN_HELP} Longformer, LED, BigBird and Perceiver bring theirs.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Other patterns for some layers: '0-3=dense, 8=window(64, 0)'.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Positions of the result; by default as many as before.")
    ] = None,
    positions: Annotated[
        str, typer.Option(help="How a learned table of positions grows: tile or interpolate.")
    ] = "tile",
    rope: Annotated[
        str | None, typer.Option(help="Scale rotary angles to --max-length: yarn or linear; by default not at all.")
    ] = None,
    global_token_ids: Annotated[str, typer.Option(help="Token ids that marked() speaks of, like '101,102'.")] = "",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it holds a checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the report; write nothing.")
    ] = False,
) -> None:
    """Write the sparse counterpart of a dense checkpoint."""
    import sparse_hf

    from ..conversion import describe_conversion, report_text

    options = {
        "layers": layers,
        "max_length": max_length,
        "positions": positions,
        "rope": rope,
        "global_token_ids": numbers(global_token_ids),
    }
    if dry_run:
        typer.echo(report_text(describe_conversion(source, pattern, **options)), nl=False)
        return
    written = sparse_hf.convert(source, out, pattern, overwrite=overwrite, **options)
    typer.echo(
        f"written to {written}; after `import sparse_hf` it loads with AutoModel.from_pretrained({str(written)!r})"
    )


def export(
    folder: Annotated[Path, typer.Argument(help="A sparse checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="dense: full attention. native: Transformers' own sliding windows, the same answers.")
    ],
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it holds a checkpoint.")] = False,
) -> None:
    """Write a sparse checkpoint as one of Transformers' own, which needs no sparse_hf."""
    from ..conversion.export import export

    written = export(folder, out, to, overwrite=overwrite)
    typer.echo(f"written to {written}; it loads with AutoModel.from_pretrained({str(written)!r}), without sparse_hf")


def card(
    folder: Annotated[Path, typer.Argument(help="A sparse checkpoint.")],
    base: Annotated[
        str | None, typer.Option(help="The dense model: a hub id, or a folder whose README.md names license and base.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a README.md that is there.")] = False,
) -> None:
    """Write the README.md of a sparse checkpoint.

    It shows the pattern as a picture, its costs, and the figures of results.json if that is there.
    """
    from ..conversion.card import write_card

    typer.echo(f"written to {write_card(folder, base=base, overwrite=overwrite)}")
