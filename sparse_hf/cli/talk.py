"""`sparse-hf generate` and `sparse-hf chat`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .arguments import PATTERN_HELP, read_folder

if TYPE_CHECKING:
    from .decoder import Answer, Decoder, Text

Folder = Annotated[str, typer.Argument(help="A decoder's folder or hub id, sparse, or dense.")]
DensePattern = Annotated[str | None, typer.Option(help=f"Make a dense decoder sparse. {PATTERN_HELP}")]
CacheName = Annotated[
    str, typer.Option(help="auto (streaming, of bounded memory, where patterns allow it), streaming or dynamic.")
]
NewTokens = Annotated[int, typer.Option(help="Most new tokens of an answer.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 takes the likeliest token; by default as the folder's generation_config.json says."),
]
Seed = Annotated[int | None, typer.Option(help="Sample the same tokens again.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default as the weights are saved.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")]


def generate(
    folder: Folder,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with the text; without both it is read from standard input.")
    ] = None,
    max_new_tokens: NewTokens = 256,
    pattern: DensePattern = None,
    cache: CacheName = "auto",
    temperature: Temperature = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the text, and what it took.")] = False,
) -> None:
    """Continue a text of any length, token by token.

    Memory is bounded where the pattern allows it. Ctrl-C ends the text where it is.
    """
    text = _read_prompt(prompt, prompt_file)
    settings = _settings(max_new_tokens, temperature, seed)
    loaded = _load(folder, pattern, cache, dtype, device)
    from .decoder import Text

    whole, written = Text(loaded, settings), []
    ids = loaded.tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty; give some text")
    found = _answer(whole, ids, written.append if as_json else _write)
    if as_json:
        figures = {"tokens_per_s": found.tokens_per_s, "seen": whole.seen, "kept": whole.kept}
        said = {
            "text": "".join(written),
            "prompt_tokens": found.asked,
            "new_tokens": found.tokens,
            "ended": found.ended,
        }
        typer.echo(json.dumps({**said, "seconds": found.seconds, **figures}, indent=2, ensure_ascii=False))
    else:
        _write("\n")
        _say(_figures(whole, found))


def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="What the chat template says before the first turn.")] = None,
    max_new_tokens: NewTokens = 512,
    pattern: DensePattern = None,
    cache: CacheName = "auto",
    temperature: Temperature = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Talk with a decoder, for as long as you like.

    Each answer is followed by the tokens that are kept, of all that were seen, and tokens a second.
    /reset forgets the conversation, /quit or Ctrl-D ends it, and Ctrl-C stops an answer.
    """
    settings = _settings(max_new_tokens, temperature, seed)
    loaded = _load(folder, pattern, cache, dtype, device)
    from .decoder import Text
    from .turns import Turns

    text, turns = Text(loaded, settings), Turns(loaded.tokenizer, system)
    _greet(loaded, turns.is_plain)
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            text.reset()
            _say("forgotten; the next line begins a conversation")
        elif line.startswith("/"):
            _say(f"{line.split()[0]} is no command; there are /reset and /quit")
        elif line:
            _turn(text, turns.ids(line, is_first=not text.seen))


def _turn(text: Text, ids: list[int]) -> None:
    try:
        found = _answer(text, ids, _write)
    except ValueError as error:
        # one that the model refuses before it computes, as a text beyond a learned table
        text.forget_unread()
        _say(f"error: {error}")
        return
    if found.read < found.asked:
        _say(
            f"stopped after {found.read:,} of {found.asked:,} tokens; the rest of the line is not part of the conversation"
        )
        return
    _write("\n")
    _say(_figures(text, found))


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("there are --prompt and --prompt-file; give one of them")
    if file is not None:
        return file.read_text(encoding="utf-8")
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise ValueError(
            "there is no prompt; give --prompt TEXT or --prompt-file FILE, or send a text to standard input"
        )
    return sys.stdin.read()


def _settings(max_new_tokens: int, temperature: float | None, seed: int | None) -> dict[str, Any]:
    """Arguments of `generate`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        settings |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    return settings


def _load(folder: str, pattern: str | None, cache: str, dtype: str | None, device: str | None) -> Decoder:
    with Console(stderr=True).status("loading"):
        from .decoder import load_decoder

        return load_decoder(read_folder(folder, tokenizer=True), pattern, cache, dtype, device)


def _greet(loaded: Decoder, is_plain: bool) -> None:
    _say(f"{loaded.config.model_type}; /reset forgets, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    if loaded.endless is not None:
        _say(f"keeps all tokens: {loaded.endless}")
    if is_plain:
        _say("the tokenizer has no chat template: the model continues your text as it is")


def _answer(text: Text, ids: list[int], write: Callable[[str], None]) -> Answer:
    from .decoder import PIECE

    with _progress(len(ids) if len(ids) > PIECE else 0) as advance:
        return text.answer(ids, write, advance)


@contextlib.contextmanager
def _progress(tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar of a long prompt, which goes once it is read; none for 0 tokens."""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not tokens) as bar:
        task = bar.add_task("reading", total=tokens)

        def advance(read: int) -> None:
            bar.advance(task, read)
            if bar.tasks[0].completed >= tokens - 1:
                # the answer is written where it stood
                bar.stop()

        yield advance


def _figures(text: Text, found: Answer) -> str:
    stopped = {"end": "", "length": ", cut at --max-new-tokens", "interrupted": ", stopped"}[found.ended]
    return f"{found.tokens:,} tokens{stopped}, {found.tokens_per_s:,.1f} tokens/s; {text.kept:,} kept of {text.seen:,} seen"


def _lines() -> Iterator[str]:
    """What the user says, line by line."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        # gives `input` its editing and its history
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            _write("\n")
            return
        except KeyboardInterrupt:
            _write("\n")
            _say("/quit or Ctrl-D ends the conversation")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    """Tell the user something that is no part of the answer."""
    Console(stderr=True, highlight=False, markup=False).print(text, style="dim", soft_wrap=True)
