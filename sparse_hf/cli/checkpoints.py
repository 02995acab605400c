"""`sparse-hf convert`, `export` and `card`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import PATTERN_HELP, TOKENS_HELP, read_layers, read_pattern, read_tokens
from .paragraphs import print_lines

Revision = Annotated[str | None, typer.Option(help="Of a hub id: a branch, a tag or a commit.")]
Subfolder = Annotated[str, typer.Option(help="The folder of the checkpoint in the source.")]
Token = Annotated[str | None, typer.Option(help="For the hub; by default the one that `hf auth login` stored.")]
Push = Annotated[str | None, typer.Option(help="Send the result to this repository of the hub, with its card.")]
Private = Annotated[bool, typer.Option("--private", help="A repository that --push makes is private.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def convert(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, or a hub id, like gpt2.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    pattern: Annotated[
        str | None, typer.Option(help=f"{PATTERN_HELP} Longformer, LED, BigBird and Perceiver bring theirs.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Other patterns for some layers: '0-3=dense, 8=window(64, 0)', or layers.json of tune, which also says the pattern."
        ),
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
    global_token_ids: Annotated[str, typer.Option(help=TOKENS_HELP)] = "",
    cache: Annotated[
        str | None,
        typer.Option(
            help="What generate decodes with: streaming, dynamic, static; by default streaming where it can be."
        ),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(help="dense: generate reads prompts by the pattern, and decodes as the dense model does."),
    ] = None,
    indexer_heads: Annotated[
        int | None, typer.Option(help="Heads of the indexers of topk(n, 'indexer'); by default 8.")
    ] = None,
    indexer_width: Annotated[int | None, typer.Option(help="Width of a head of these indexers; by default 64.")] = None,
    indexer_share: Annotated[
        int | None, typer.Option(help="Neighbouring layers that go by one indexer; by default each has its own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it holds a checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the report; write nothing.")
    ] = False,
    revision: Revision = None,
    subfolder: Subfolder = "",
    token: Token = None,
    push: Push = None,
    private: Private = False,
    as_json: AsJson = False,
) -> None:
    """Write the sparse counterpart of a dense checkpoint."""
    import sparse_hf

    from ..conversion import describe_conversion, report_text

    pattern = read_pattern(pattern, layers)
    options = {
        "layers": read_layers(layers),
        "max_length": max_length,
        "positions": positions,
        "rope": rope,
        "global_token_ids": read_tokens(global_token_ids),
        "cache": cache,
        "decode": decode,
        "indexer": _sizes(heads=indexer_heads, width=indexer_width, share=indexer_share),
        "revision": revision,
        "subfolder": subfolder,
        "token": token,
    }
    if dry_run:
        if push is not None:
            raise ValueError(
                f"--dry-run writes nothing that could be sent to {push}; leave out one of --dry-run and --push"
            )
        report = describe_conversion(source, pattern, **options)
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            print_lines(report_text(report).splitlines())
        return
    written = sparse_hf.convert(source, out, pattern, overwrite=overwrite, **options)
    _tell(written, "after `import sparse_hf` it loads", as_json)
    _push(written, push, private, token)


def _sizes(**given: int | None) -> dict[str, int] | None:
    """Those that were given; None if none was."""
    return {name: value for name, value in given.items() if value is not None} or None


def export(
    folder: Annotated[str, typer.Argument(help="A sparse checkpoint: a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="dense: full attention. native: Transformers' own sliding windows, the same answers.")
    ],
    drop: Annotated[
        str | None, typer.Option(help="A part of patterns that native leaves out, like 'first(4)'; its cost is said.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text on which to measure what --drop costs.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it holds a checkpoint.")] = False,
    revision: Revision = None,
    subfolder: Subfolder = "",
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Write a sparse checkpoint as one of Transformers' own, which needs no sparse_hf."""
    from ..conversion.export import export

    where = {"revision": revision, "subfolder": subfolder, "token": token}
    written = export(folder, out, to, drop=drop, text=text, overwrite=overwrite, **where)
    _tell(written, "without sparse_hf it loads", as_json)


def card(
    folder: Annotated[Path, typer.Argument(help="A sparse checkpoint.")],
    base: Annotated[
        str | None, typer.Option(help="The dense model: a hub id, or a folder whose README.md names license and base.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a README.md that is there.")] = False,
    push: Push = None,
    private: Private = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Write the README.md of a sparse checkpoint.

    It shows the pattern as a picture, its costs, and the figures of results.json if that is there.
    """
    from ..conversion.card import write_card

    written = write_card(folder, base=base, address=push, overwrite=overwrite)
    typer.echo(json.dumps({"file": str(written)}) if as_json else f"written to {written}")
    _push(folder, push, private, token)


def _tell(folder: Path, how: str, as_json: bool) -> None:
    """Say where a checkpoint was written, and what loads it."""
    from ..conversion.loading import auto_class

    name = auto_class(folder)
    told = f"written to {folder}\n{how} with {name}.from_pretrained({str(folder)!r})"
    typer.echo(json.dumps({"folder": str(folder), "auto_class": name}) if as_json else told)


def _push(folder: Path, repo: str | None, private: bool, token: str | None) -> None:
    if repo is not None:
        from ..conversion import push_to_hub

        # not False: without the flag it is as the owner's settings say
        typer.echo(f"sent to {push_to_hub(folder, repo, private=private or None, token=token)}")
    elif private:
        raise ValueError("--private is about a repository that --push makes; name it by --push")
