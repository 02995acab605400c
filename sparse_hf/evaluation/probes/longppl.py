"""Perplexity of the tokens that need the far past (LongPPL, arXiv:2410.23771).

Legend: n tokens of a text, S tokens of a short past, G tokens that share one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..passes import losses, read
from ..pieces import Finished, Found, Piece
from ..subject import Contender
from ..texts import Sample
from .base import Setup, by_candidate, of_samples

# a key token is one whose loss falls by more than this with the whole past, and is below this then
ALPHA, BETA = 2.0, 2.0
# the short past and the tokens that share one, as parts of a text: 4,096 and 1,024 of 32,768
SHORT, SHARED = 8, 32


class LongPPL:
    """Perplexity of key tokens: those that the dense model knows from the whole text, and not from a short past.

    Plain perplexity is a mean over tokens most of which need the last few alone. Key tokens are chosen by the dense model, once
    for all candidates; a short past has an eighth of the text.
    """

    name: ClassVar[str] = "longppl"

    def why_not(self, setup: Setup) -> str | None:
        if setup.subject.kind != "decoder":
            return f"{type(setup.subject.dense.model).__name__} predicts no next token; longppl asks models ForCausalLM"
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        yield from of_samples(self.name, setup, setup.subject.contenders, measure, 3)
        for s, sample in enumerate(setup.samples):
            what = {"short": True, "text": sample.name, "ids": sample.digest}
            work = partial(_short, setup, sample)
            yield Piece(self.name, "", what, setup.subject.dense.weights, (1, s, 0), work)

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        of_all = by_candidate(finished)
        short, dense = of_all.pop(""), of_all["dense"]
        keys = [key_tokens(own["loss"], whole["loss"]) for own, whole in zip(short, dense, strict=True)]
        count = sum(map(len, keys))
        return {
            "tokens": sum(len(own["loss"]) for own in short),
            "key_tokens": count,
            "short": setup.settings.length // SHORT,
            "candidates": {name: {"perplexity": _of_keys(found, keys, count)} for name, found in of_all.items()},
        }


def key_tokens(short: Sequence[float], whole: Sequence[float]) -> list[int]:
    """Which tokens are key tokens, from their losses behind a short past and behind all of it."""
    return [i for i, (s, w) in enumerate(zip(short, whole, strict=True)) if s - w > ALPHA and w < BETA]


def _of_keys(found: Sequence[Found], keys: Sequence[Sequence[int]], count: int) -> float | None:
    """None where no text has a key token."""
    total = sum(own["loss"][i] for own, of_text in zip(found, keys, strict=True) for i in of_text)
    return math.exp(total / count) if count else None


def measure(setup: Setup, contender: Contender, sample: Sample) -> Found:
    """The loss of each token that has a short past."""
    ids = sample.ids[0]
    found = losses(contender.model, setup.reading(contender, sample).last, ids)
    return {"loss": _listed(found[len(ids) // SHORT - 1 :])}


def _short(setup: Setup, sample: Sample) -> Found:
    ids = sample.ids[0]
    setup.passes.forget()
    return {
        "loss": _listed(short_losses(setup.subject.dense.model, ids, len(ids) // SHORT, max(1, len(ids) // SHARED)))
    }


def short_losses(model: PreTrainedModel, ids: Tensor, short: int, shared: int) -> Tensor:
    """The loss of each token of `ids` `[n]` from the S-th on, `[n - S]`: `shared` tokens at a time see the S before them."""
    found = []
    for start in range(0, len(ids) - short, shared):
        part = ids[start : start + short + shared]
        found.append(losses(model, read(model, part[None]).last, part)[short - 1 :])
    return torch.cat(found)


def _listed(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
