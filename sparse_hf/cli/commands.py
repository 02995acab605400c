"""The table of commands, and what happens to errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from . import talk
from .bench import attention, chosen, generate, memory, models, plan, sequence
from .checkpoints import card, convert, export
from .evaluate import evaluate, tune
from .examples import epilog, paragraphs
from .families import list_families
from .info import info
from .mistakes import MISTAKES, by_flags, one_line
from .paragraphs import wrap_warnings
from .plan_memory import plan_memory
from .show import show

# in the order in which help lists them
COMMANDS: dict[str, Callable] = {
    "show": show,
    "convert": convert,
    "export": export,
    "card": card,
    "generate": talk.generate,
    "chat": talk.chat,
    "list": list_families,
    "info": info,
    "evaluate": evaluate,
    "tune": tune,
    "plan-memory": plan_memory,
}
BENCHES: dict[str, Callable] = {
    "attention": attention,
    "chosen": chosen,
    "models": models,
    "plan": plan,
    "generate": generate,
    "memory": memory,
    "sequence": sequence,
}

app = typer.Typer(
    help="Sparse attention for Transformers: draw patterns, convert checkpoints, talk with them, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Is it fast? Peers beside ours in one run, correctness checked first.", no_args_is_help=True)
for group, before, commands in ((app, "", COMMANDS), (bench, "bench ", BENCHES)):
    for name, command in commands.items():
        group.command(name, help=paragraphs(command), epilog=epilog(before + name))(by_flags(command))
app.add_typer(bench, name="bench")


def _version(shown: bool) -> None:
    if shown:
        from ..version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks of errors.")] = False,
) -> None:
    # read by `main` from the command line, where errors are caught
    del version, debug


def main() -> None:
    """Run the command; a user's mistake is one clear line and exit code 2."""
    wrap_warnings()
    try:
        app()
    except MISTAKES as error:
        if "--debug" in sys.argv:
            raise
        console = Console(stderr=True, highlight=False)
        # a terminal would cut words, and a file has lines of any length
        told = Text.assemble(("error:", "bold red"), " ", one_line(error))
        console.print(told, soft_wrap=not console.is_terminal)
        raise SystemExit(2) from None
