"""Texts, as tokens: read and measured before any heavy work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .settings import SHORTEST, Settings

# characters of a token at the most, so that no more of a long file is read than is needed
CHARACTERS = 16


@dataclass(frozen=True)
class Text:
    """A text and what it is called."""

    name: str
    content: str


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens `[1, n]` of a text, from its token `start` on."""

    text: str
    start: int
    ids: Tensor

    @property
    def digest(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:20]

    @property
    def name(self) -> str:
        return f"{self.text} from token {self.start:,}" if self.start else self.text


def read_texts(texts: str | Path | Sequence[str | Path]) -> list[Text]:
    """Texts from what users give: strings are texts, paths are files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no text, an empty one, or one that is not UTF-8.
    """
    given = [texts] if isinstance(texts, (str, Path)) else list(texts)
    if not given:
        raise ValueError("texts is empty; give texts of the kind that the model will read")
    found = [_read(one, i) for i, one in enumerate(given)]
    empty = next((text.name for text in found if not text.content.strip()), None)
    if empty is not None:
        raise ValueError(f"{empty} is empty; give texts of the kind that the model will read")
    return found


def _read(what: str | Path, number: int) -> Text:
    if isinstance(what, str):
        return Text(f"text {number + 1}", what)
    if what.is_dir():
        raise ValueError(f"{what} is a folder; give the files in it, one by one")
    if not what.is_file():
        raise FileNotFoundError(f"there is no text {what}")
    try:
        return Text(what.name, what.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not text in UTF-8: {error}") from None


def cut(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Sample]:
    """Samples of `settings.length` tokens from every text, evenly spaced.

    Raises:
        ValueError: a text that is shorter.
    """
    samples, length = [], settings.length
    for text in texts:
        # of several samples the last ends with the text
        content = text.content if settings.samples > 1 else text.content[: CHARACTERS * length]
        ids = tokenize(tokenizer, content)
        if len(ids) < length:
            smaller = f", or a smaller length (--length {len(ids)})" if len(ids) >= SHORTEST else ""
            raise ValueError(
                f"{text.name} has {len(ids):,} tokens, and {length:,} of each text are read; give longer texts{smaller}"
            )
        room = len(ids) - length
        starts = [round(i * room / max(settings.samples - 1, 1)) for i in range(settings.samples)]
        samples += [Sample(text.name, at, torch.tensor([ids[at : at + length]])) for at in dict.fromkeys(starts)]
    return samples


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """The ids of a text of any length, without a word on limits, which are looked at elsewhere."""
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
