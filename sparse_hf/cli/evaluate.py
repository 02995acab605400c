"""`sparse-hf evaluate`."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .arguments import PATTERN_HELP, numbers, words

# where an evaluation is kept, beside what it is of
FOLDER = "{}-evaluation"


def evaluate(
    model: Annotated[str, typer.Argument(help="A decoder or encoder, dense or sparse: a folder or a hub id.")],
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{PATTERN_HELP} May be 'NAME: PATTERN; LAYERS', or the folder of a sparse checkpoint. Give several, one by one."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Other patterns for some layers, of every --pattern that names none: '0-/4=dense'."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A file of the kind that the model will read. Give several.")
    ] = None,
    probes: Annotated[
        str,
        typer.Option(
            help="Any of divergence, perplexity, masked, embedding, coverage, recall, cost, with commas; by default all that the model "
            "can be asked."
        ),
    ] = "",
    length: Annotated[int, typer.Option(help="Tokens of each sample.")] = 2048,
    samples: Annotated[int, typer.Option(help="Samples per text, evenly spaced in it.")] = 1,
    lengths: Annotated[
        str,
        typer.Option(help="Tokens of the texts of recall and cost; by default a quarter, half and all of --length."),
    ] = "",
    depths: Annotated[
        str, typer.Option(help="Where facts stand that recall asks for, 0 at the beginning.")
    ] = "0.1,0.5,0.9",
    repeats: Annotated[int, typer.Option(help="Questions of recall for each task, length and depth.")] = 1,
    tasks: Annotated[
        str,
        typer.Option(
            help="Any of passkey, needle, needles, values, variables, pairs, words, with commas; by default all."
        ),
    ] = "",
    global_token_ids: Annotated[str, typer.Option(help="Token ids that marked() speaks of, like '101,102'.")] = "",
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for finished pieces and the report; by default MODEL-evaluation, here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    opened: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Measure what patterns cost a model in quality, and what they save, on your texts.

    Beside the dense model stand any number of patterns with the same weights. An interrupted run goes on with the same command.

    Example: sparse-hf evaluate my-llama --pattern "window(1023, 0) | first(4)" --text contract.txt --open
    """
    import sparse_hf

    from ..evaluation import Candidate, Settings

    settings = Settings(
        length=length,
        samples=samples,
        lengths=tuple(numbers(lengths)),
        depths=tuple(_depth(word) for word in words(depths)),
        repeats=repeats,
        tasks=tuple(words(tasks)),
        global_token_ids=tuple(numbers(global_token_ids)),
        seed=seed,
        # a screen shows it, and a file of lines would not
        progress=Console(stderr=True).is_terminal,
    )
    candidates = [Candidate.read(one).with_layers(layers) for one in pattern or ()]
    folder = out or Path(FOLDER.format(Path(model).name))
    try:
        found = sparse_hf.evaluate(
            model, candidates, text or (), probes=words(probes) or None, out=folder, settings=settings
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is finished is in {folder}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(found.result, indent=1))
    else:
        found.print(Console())
    typer.echo(f"the report is {folder / 'report.html'}", err=True)
    if opened:
        webbrowser.open((folder / "report.html").resolve().as_uri())


def _depth(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"--depths has {word!r}; give shares of a text, like '0.1,0.5,0.9'") from None
