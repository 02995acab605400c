"""`sparse-hf evaluate` and `sparse-hf tune`."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from .arguments import PATTERN_HELP, TOKENS_HELP, numbers, read_folder, read_layers, read_tokens, words

# options of both commands
Texts = Annotated[
    list[Path] | None, typer.Option(help="A file of the kind that the model will read. Give several, one by one.")
]
Length = Annotated[int, typer.Option(help="Tokens of each sample.")]
Samples = Annotated[int, typer.Option(help="Samples per text, evenly spaced in it.")]
Lengths = Annotated[
    str, typer.Option(help="Tokens of the texts of recall and cost; by default a quarter, half and all of --length.")
]
Depths = Annotated[str, typer.Option(help="Where facts stand that recall asks for, 0 at the beginning.")]
Repeats = Annotated[int, typer.Option(help="Questions of recall for each task, length and depth.")]
Tasks = Annotated[
    str,
    typer.Option(
        help="Tasks of recall with commas, like 'passkey,niah_multikey_1', or a group: 'short' (passkey, needle, needles, values, "
        "variables, pairs, words; the default) or 'ruler' (the thirteen of RULER)."
    ),
]
Questions = Annotated[
    list[Path] | None,
    typer.Option(help="A file of questions about documents, as SQuAD or HotpotQA has them, for qa_1 and qa_2."),
]
Harness = Annotated[
    list[Path] | None,
    typer.Option(help="A task's YAML file for lm-evaluation-harness, which asks it if it is installed."),
]
Batch = Annotated[
    int, typer.Option(help="Questions that are asked together: more are faster on a GPU, and take memory.")
]
DType = Annotated[
    str | None,
    typer.Option(help="Of weights: float32, bfloat16 or float16; by default the folder's on a GPU, float32 on a CPU."),
]
Seed = Annotated[int, typer.Option(help="Of whatever is drawn.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")]
Opened = Annotated[bool, typer.Option("--open", help="Open the report in a browser.")]


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
    text: Texts = None,
    probes: Annotated[
        str,
        typer.Option(
            help="Any of divergence, perplexity, longppl, masked, embedding, coverage, recall, harness, cost, with commas; by default "
            "all that the model can be asked."
        ),
    ] = "",
    length: Length = 2048,
    samples: Samples = 1,
    lengths: Lengths = "",
    depths: Depths = "0.1,0.5,0.9",
    repeats: Repeats = 1,
    tasks: Tasks = "",
    questions: Questions = None,
    harness: Harness = None,
    batch: Batch = 1,
    dtype: DType = None,
    global_token_ids: Annotated[str, typer.Option(help=TOKENS_HELP)] = "",
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for finished pieces and the report; by default MODEL-evaluation, here."),
    ] = None,
    as_json: AsJson = False,
    opened: Opened = False,
) -> None:
    """Measure what patterns cost a model in quality, and what they save, on your texts.

    Beside the dense model stand any number of patterns with the same weights. An interrupted run goes on with the same command.
    """
    from ..evaluation import Candidate, evaluate

    read_folder(model, tokenizer=True)
    for one in pattern or ():
        if Path(one).is_dir():
            read_folder(one)
    settings = _settings(
        length=length, samples=samples, lengths=lengths, depths=depths, repeats=repeats, tasks=tasks, seed=seed,
        questions=tuple(questions or ()), harness=tuple(harness or ()), batch=batch, dtype=dtype,
        global_token_ids=token_ids(global_token_ids, model),
    )  # fmt: skip
    candidates = [Candidate.read(one).with_layers(read_layers(layers)) for one in pattern or ()]
    folder = out or Path(f"{Path(model).name}-evaluation")
    with _interruptible(folder):
        found = evaluate(model, candidates, _given(text), probes=words(probes) or None, out=folder, settings=settings)
    _tell(found, folder, as_json, opened)


def tune(
    model: Annotated[str, typer.Argument(help="A decoder: a folder or a hub id.")],
    pattern: Annotated[
        list[str],
        typer.Option(
            help=f"{PATTERN_HELP} Of the layers that do not stay dense. Of several, given one by one, the best for the budget is taken."
        ),
    ],
    text: Texts = None,
    budget: Annotated[
        str, typer.Option(help="The share that stays dense, or that may be spent (--of), like 0.25 or 25%.")
    ] = "0.25",
    of: Annotated[
        str,
        typer.Option(
            help="What --budget is a share of: layers, pairs, bytes of the cache, or time to read the longest of --lengths, which is "
            "measured here."
        ),
    ] = "layers",
    by: Annotated[
        str, typer.Option(help="What stays dense: layers, heads, or both for what moves the answers less.")
    ] = "layers",
    rank: Annotated[
        str,
        typer.Option(
            help="By what layers are ranked: answers (a pass for each layer and question), text (answers, and what is said at the "
            "end of the texts) or attention (a pass for each question)."
        ),
    ] = "answers",
    length: Length = 2048,
    samples: Samples = 1,
    lengths: Lengths = "",
    depths: Depths = "0.1,0.5,0.9",
    repeats: Repeats = 1,
    tasks: Tasks = "",
    questions: Questions = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text that the choice is checked on, in place of those of --text. Give several, one by one."
        ),
    ] = None,
    batch: Batch = 1,
    dtype: DType = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder for finished pieces and the report; by default MODEL-tuning, here.")
    ] = None,
    as_json: AsJson = False,
    opened: Opened = False,
) -> None:
    """Choose the layers or heads of a decoder that stay dense while all else gets a pattern.

    Layers are ranked by how far answers move when one alone is local, and chosen one by one; heads by their attention to what
    answers copy. Of several patterns the one whose answers move least is taken. The choice is held against as many layers evenly
    spaced and against wider windows, on other questions, and takes no more than the budget. An interrupted run goes on with the
    same command.
    """
    from ..evaluation import Budget, tune

    read_folder(model, tokenizer=True)
    settings = _settings(
        length=length, samples=samples, lengths=lengths, depths=depths, repeats=repeats, tasks=tasks, seed=seed,
        questions=tuple(questions or ()), held_out=tuple(held_out or ()), batch=batch, dtype=dtype,
    )  # fmt: skip
    spent = Budget(share=read_budget(budget), of=cast(Any, of), by=cast(Any, by), rank=cast(Any, rank))
    folder = out or Path(f"{Path(model).name}-tuning")
    with _interruptible(folder):
        found = tune(model, pattern, _given(text), budget=spent, out=folder, settings=settings)
    _tell(found, folder, as_json, opened)


def _given(texts: list[Path] | None) -> list[Path]:
    if not texts:
        raise ValueError("--text is missing; give a file of the kind that the model will read")
    return texts


def token_ids(text: str, model: str) -> tuple[int, ...]:
    """Ids of tokens, of which some may be named by their texts."""
    from transformers import AutoTokenizer

    from ..conversion.token_ids import ids_of

    return ids_of(read_tokens(text), partial(AutoTokenizer.from_pretrained, model), model)


def _settings(*, lengths: str, depths: str, tasks: str, **others: Any):
    from ..evaluation import Settings

    return Settings(
        lengths=tuple(numbers(lengths)),
        depths=tuple(_depth(word) for word in words(depths)),
        tasks=tuple(words(tasks)),
        # a screen shows it, and a file of lines would not
        progress=Console(stderr=True).is_terminal,
        **others,
    )


def _depth(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"--depths has {word!r}; give shares of a text, like '0.1,0.5,0.9'") from None


def read_budget(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"--budget is {text!r}; give a share, like 0.25 or 25%") from None


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """Say how to go on after an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is finished is in {folder}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None


def _tell(found: Any, folder: Path, as_json: bool, opened: bool) -> None:
    """Print what was found, and where its report is."""
    if as_json:
        typer.echo(json.dumps(found.result, indent=1))
    else:
        found.print(Console())
    report = folder / "report.html"
    typer.echo(f"the report is {report}", err=True)
    if opened:
        webbrowser.open(report.resolve().as_uri())
