"""Pieces of work that are kept when they are finished, so that an evaluation goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Found = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Piece:
    """Work of some seconds or minutes, whose result is JSON.

    Args:
        probe: its name.
        candidate: the name of the contender that it looks at, "" where it looks at all.
        what: what the result depends on beside that and the contender's weights: a text's tokens, a length, a seed.
        weights: of all models that it looks at.
        order: pieces are done in this order, so that those that share a forward pass follow each other.
        work: gives the result.
    """

    probe: str
    candidate: str
    what: dict[str, Any]
    weights: str
    order: tuple[int, ...]
    work: Callable[[], Found]

    @property
    def file(self) -> str:
        text = json.dumps([self.probe, self.what, self.weights], sort_keys=True)
        return f"{self.probe}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


@dataclass(frozen=True, eq=False)
class Finished:
    """A piece that is done: `found` is what its work gave, in `seconds`."""

    probe: str
    candidate: str
    what: dict[str, Any]
    found: Found
    seconds: float


def finish(pieces: Sequence[Piece], folder: Path | None, progress: bool) -> list[Finished]:
    """Do what is not in the folder yet. A piece is written when it is whole; an interrupt loses the one that is under way."""
    ordered = sorted(pieces, key=lambda piece: piece.order)
    return list(_finished(ordered, folder, progress))


def _finished(pieces: Sequence[Piece], folder: Path | None, progress: bool) -> Iterator[Finished]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("evaluating", total=len(pieces))
        for piece in pieces:
            bar.update(task, description=f"{piece.probe} {piece.candidate}".strip()[:40])
            yield _one(piece, folder)
            bar.advance(task)


def _one(piece: Piece, folder: Path | None) -> Finished:
    path = None if folder is None else folder / piece.file
    kept = None if path is None or not path.exists() else _read(path)
    if kept is None:
        begin = time.perf_counter()
        kept = {"found": piece.work(), "seconds": time.perf_counter() - begin}
        if path is not None:
            _write(kept | {"probe": piece.probe, "candidate": piece.candidate, "what": piece.what}, path)
    return Finished(piece.probe, piece.candidate, piece.what, kept["found"], kept["seconds"])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        # not one of ours, or damaged on the disk: it is made anew
        return None


def _write(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(file.name, path)
