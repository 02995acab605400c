"""What stands beside the dense model: patterns by name, as texts or as folders of sparse checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..models.hf.layer_spec import LayersLike
from ..pattern import Pattern
from ..pattern.like import PatternLike

DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """A pattern that is evaluated beside dense attention.

    Args:
        name: what tables and pictures call it.
        pattern: a `Pattern` or its text.
        layers: which layers have another pattern, see `sparse_hf.parse_layers`.
        folder: in place of a pattern, a sparse checkpoint with weights of its own.
        decode: "dense" has prompts read by the pattern, and answers said as the dense model says them.

    Example: `Candidate("every second dense", "window(511, 0)", "0-/2=dense")`.
    """

    name: str
    pattern: PatternLike | None = None
    layers: LayersLike = None
    folder: Path | None = None
    decode: str | None = None

    @staticmethod
    def read(text: str | Path) -> Candidate:
        """A candidate from its text, `NAME: PATTERN; LAYERS; decode=dense`, of which PATTERN must be there, or from a folder.

        Raises:
            ValueError: a text without a pattern.
        """
        if Path(text).is_dir():
            return Candidate(Path(text).name, folder=Path(text))
        name, colon, rest = str(text).partition(":")
        written = rest if colon else str(text)
        pattern, *others = (part.strip() for part in written.split(";"))
        decode = DENSE if "decode=dense" in others else None
        layers = next((part for part in others if part != "decode=dense"), None)
        if not pattern:
            raise ValueError(
                f"{str(text)!r} has no pattern; write 'PATTERN', 'NAME: PATTERN' or 'NAME: PATTERN; LAYERS'"
            )
        return Candidate(
            name.strip() if colon else written.strip(), Pattern.parse(pattern), layers or None, decode=decode
        )

    def with_layers(self, layers: str | None) -> Candidate:
        """The candidate with these layers, if it names none itself and has a pattern."""
        return self if layers is None or self.layers or self.folder else replace(self, layers=layers)


def read_candidates(patterns: object) -> list[Candidate]:
    """Candidates from what users give: one of them or several, or a mapping from names.

    Raises:
        ValueError: a name that occurs twice, or is that of the dense model.
        TypeError: something that is no pattern.
    """
    if isinstance(patterns, (str, Path, Pattern, Candidate)):
        patterns = [patterns]
    if isinstance(patterns, Mapping):
        patterns = [_named(name, what) for name, what in patterns.items()]
    if not isinstance(patterns, Sequence):
        raise TypeError(f"patterns is a {type(patterns).__name__}; give patterns, their texts, or candidates")
    found = [_candidate(one) for one in patterns]
    names = [DENSE, *(one.name for one in found)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice == DENSE:
        raise ValueError("a candidate is named 'dense', as the model without a pattern is; give it another name")
    if twice is not None:
        raise ValueError(f"two candidates are named {twice!r}; name them apart, like 'NAME: PATTERN'")
    return found


def _candidate(what: object) -> Candidate:
    if isinstance(what, Candidate):
        return what
    if isinstance(what, Pattern):
        return Candidate(str(what), what)
    if isinstance(what, (str, Path)):
        return Candidate.read(what)
    raise TypeError(f"patterns has a {type(what).__name__}; give patterns, their texts, or candidates")


def _named(name: str, what: object) -> Candidate:
    return replace(_candidate(what), name=name)
