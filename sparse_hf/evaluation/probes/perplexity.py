"""Perplexity of decoders, by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from ..passes import losses
from ..pieces import Finished, Found, Piece
from ..subject import Contender
from ..texts import Sample
from .base import Setup, added, by_candidate, of_samples, range_edges, range_sums, ratios


class Perplexity:
    """exp of the mean loss of every token but the first, by its position."""

    name: ClassVar[str] = "perplexity"

    def why_not(self, setup: Setup) -> str | None:
        if setup.subject.kind != "decoder":
            return (
                f"{type(setup.subject.dense.model).__name__} predicts no next token; perplexity asks models ForCausalLM"
            )
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        return of_samples(self.name, setup, setup.subject.contenders, measure, 1)

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        of_contenders = {}
        for name, found in by_candidate(finished).items():
            lost, tokens = added([f["loss"] for f in found]), added([f["tokens"] for f in found])
            means = ratios(lost, tokens)
            of_contenders[name] = {
                "perplexity": math.exp(sum(lost) / sum(tokens)),
                "by_position": [None if mean is None else math.exp(mean) for mean in means],
            }
        return {"edges": range_edges(setup.settings.length), "candidates": of_contenders}


@torch.inference_mode()
def measure(setup: Setup, contender: Contender, sample: Sample) -> Found:
    states, ids = setup.reading(contender, sample).last, sample.ids[0]
    positions = torch.arange(1, len(ids))
    return {
        "loss": range_sums(losses(contender.model, states, ids), positions, len(ids)),
        "tokens": range_sums(torch.ones(len(positions)), positions, len(ids)),
    }
