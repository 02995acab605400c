"""The command `sparse-hf`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Sparse attention for Transformers: draw patterns, convert checkpoints, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Is it fast? Peers beside ours in one run, correctness checked first.", no_args_is_help=True)
app.add_typer(bench, name="bench")

OUT_HELP = "Write the figures to this JSON file; in a folder, to MACHINE/DATE-BENCHMARK.json."
PATTERN_HELP = "A pattern, like 'window(256, 256) | first(1)', or a recipe, like 'longformer(attention_window=512)'."


def _version(shown: bool) -> None:
    if shown:
        from .version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks of errors.")] = False,
) -> None:
    # read by `main` from the command line, where errors are caught
    del version, debug


@app.command()
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
    from .analysis import render, render_stack, save_png

    if png and len(patterns) > 1:
        raise ValueError(f"--png draws one pattern, and there are {len(patterns)}; draw them one by one")

    options = {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "marked": tuple(_numbers(marked)),
    }
    several = len(patterns) > 1
    Console().print(render_stack(patterns, length, **options) if several else render(patterns[0], length, **options))
    if png:
        save_png(patterns[0], length, png, **options)
        Console(stderr=True).print(f"drawn to {png}")


@app.command()
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

    from .conversion import describe_conversion, report_text

    options = {
        "layers": layers,
        "max_length": max_length,
        "positions": positions,
        "rope": rope,
        "global_token_ids": _numbers(global_token_ids),
    }
    if dry_run:
        typer.echo(report_text(describe_conversion(source, pattern, **options)), nl=False)
        return
    written = sparse_hf.convert(source, out, pattern, overwrite=overwrite, **options)
    typer.echo(
        f"written to {written}; after `import sparse_hf` it loads with AutoModel.from_pretrained({str(written)!r})"
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A sparse checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="dense: full attention. native: Transformers' own sliding windows, the same answers.")
    ],
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it holds a checkpoint.")] = False,
) -> None:
    """Write a sparse checkpoint as one of Transformers' own, which needs no sparse_hf."""
    from .conversion.export import export

    written = export(folder, out, to, overwrite=overwrite)
    typer.echo(f"written to {written}; it loads with AutoModel.from_pretrained({str(written)!r}), without sparse_hf")


@app.command()
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
    from .conversion.card import write_card

    typer.echo(f"written to {write_card(folder, base=base, overwrite=overwrite)}")


@app.command("list")
def list_families(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the names of the classes.")] = False,
) -> None:
    """List the families of models that have sparse counterparts.

    Verified ones have tests of their own. Derived ones are made when they are first met, and compared
    with their dense class before they are used; named are those that worked when all were tried.
    """
    from . import FAMILIES, derived_types

    rows = [
        {
            "family": name,
            "kind": "verified",
            "model_type": family.sparse_type,
            "heads": [c.__name__ for c in family.classes],
            "positions": family.positions.scheme,
            "conversion": family.positions.conversion,
        }
        for name, family in sorted(FAMILIES.items())
        if family.verified
    ]
    derived = [name for name in derived_types() if name not in {row["family"] for row in rows}]
    if as_json:
        typer.echo(json.dumps([*rows, *({"family": name, "kind": "derived"} for name in derived)], indent=2))
        return
    table = Table(box=box.SIMPLE, pad_edge=False, title="verified", title_justify="left")
    for column in ("family", "sparse", "heads", "positions", "conversion to a greater length"):
        table.add_column(column, min_width=34 if column == "heads" else None)
    for row in rows:
        table.add_row(row["family"], row["model_type"], _short(row["heads"]), row["positions"], row["conversion"])
    # wide enough that no name is cut, in a narrow window or a pipe too
    console = Console(width=max(Console().width, 132))
    console.print(table)
    console.print(f"derived when they are first met ({len(derived)} that were tried):", ", ".join(derived))


def _short(heads: list[str]) -> str:
    """Names of heads without what they share: "Model, MaskedLM"."""
    common = len(os.path.commonprefix(heads))
    return ", ".join(name[common:].replace("For", "") for name in heads)


@bench.command("attention")
def bench_attention(
    lengths: Annotated[str, typer.Option(help="Tokens, ascending.")] = "4096,16384,65536",
    pattern: Annotated[str, typer.Option(help=PATTERN_HELP)] = "window(511, 0)",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; by default as many as query heads.")] = None,
    head_dim: Annotated[int, typer.Option(help="Numbers per head.")] = 64,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    backends: Annotated[str, typer.Option(help="Backends, with commas; by default all but the reference.")] = "",
    budget: Annotated[
        float, typer.Option(help="Seconds per figure; dense attention stops where it would take longer.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
) -> None:
    """Time one attention layer, forward and backward, length by length.

    Beside it run dense SDPA, the window kernels of others, and the sparse attention of other
    packages that are installed.
    """
    from .bench import run_attention

    run_attention(
        _lengths(lengths),
        pattern,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        backends=_words(backends) or None,
        budget=budget,
        out=out,
        plot=plot,
    )


@bench.command("models")
def bench_models(
    models: Annotated[
        str,
        typer.Option(
            help="Any of bert, longformer, big_bird, reformer, perceiver, sparse_transformer, modernbert, mistral, llama_1b, "
            "with commas."
        ),
    ] = "longformer,big_bird,bert",
    lengths: Annotated[str, typer.Option(help="Tokens, ascending.")] = "4096,16384",
    layers: Annotated[int, typer.Option(help="Layers of each model.")] = 12,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    training: Annotated[bool, typer.Option(help="Time a training step as well.")] = True,
    compile_mode: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="Time ours under torch.compile in this mode (default, reduce-overhead), theirs with and without.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Gradient checkpointing: keep no activations inside layers.")
    ] = False,
    budget: Annotated[
        float, typer.Option(help="Seconds per figure; a model that took longer is not run on longer texts.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
) -> None:
    """Time whole models with random weights beside Transformers' classes.

    Forward and training step, length by length; modernbert and mistral beside Transformers' sliding
    windows on sdpa and on flex_attention.
    """
    from .bench import run_models

    run_models(
        _words(models),
        _lengths(lengths),
        layers=layers,
        batch=batch,
        dtype=dtype,
        device=device,
        training=training,
        compile_mode=compile_mode,
        checkpointing=checkpointing,
        budget=budget,
        out=out,
        plot=plot,
    )


@bench.command("plan")
def bench_plan(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help=f"{PATTERN_HELP} By default a window, one with sinks, longformer() and bigbird()."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "16384,65536,262144,1048576",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda, which is to hold the tables; by default the GPU if there is one.")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Seconds; a pattern that took longer is not planned for longer texts.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
) -> None:
    """Measure what the tables of patterns take to build and to keep, length by length.

    The tables are compared with the patterns first.
    """
    from .bench import PLAN_PATTERNS, run_plan

    run_plan(patterns or PLAN_PATTERNS, _lengths(lengths), device=device, budget=budget, out=out, plot=plot)


@bench.command("decode")
def bench_decode(
    lengths: Annotated[str, typer.Option(help="Tokens of the context.")] = "1024,4096,16384",
    pattern: Annotated[str, typer.Option(help=PATTERN_HELP)] = "streaming(window=1024, sinks=4)",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    hidden_size: Annotated[int, typer.Option(help="Numbers per token, in heads of 64.")] = 512,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; by default as many as query heads.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    tokens: Annotated[int, typer.Option(help="Timed tokens, of which the median counts.")] = 32,
    chunk: Annotated[
        int | None, typer.Option(help="Fill the cache by so many tokens at a time; by default all at once.")
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            help="dynamic (copied with every token), static (its memory is there from the start) or streaming (drops what the "
            "pattern never sees again; the dense model has a static one)."
        ),
    ] = "dynamic",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    budget: Annotated[
        float, typer.Option(help="Seconds; a model that took longer to read a context is not run on longer ones.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
) -> None:
    """Time tokens one at a time with a cache, context by context.

    A sparse decoder runs beside the dense one with the same weights. A dynamic or static cache
    keeps all keys: a sparse decoder reads less of it, and holds as much. A streaming one keeps its
    size.
    """
    from .bench import run_decode

    run_decode(
        _lengths(lengths),
        pattern,
        layers=layers,
        hidden_size=hidden_size,
        kv_heads=kv_heads,
        batch=batch,
        tokens=tokens,
        chunk=chunk,
        cache=cache,
        dtype=dtype,
        device=device,
        budget=budget,
        out=out,
        plot=plot,
    )


def _words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    return [_number(word) for word in _words(text)]


def _lengths(text: str) -> list[int]:
    numbers = _numbers(text)
    if not numbers:
        raise ValueError("--lengths is empty; give numbers of tokens, like '4096,16384'")
    return numbers


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def main() -> None:
    """Run the command; a user's mistake is one clear line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True).print("[bold red]error:[/]", end=" ")
        Console(stderr=True, markup=False, highlight=False).print(str(error), soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
