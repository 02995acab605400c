"""How far answers and states move from the dense model's, and where it begins.

Legend: n tokens, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from ..passes import answers
from ..pieces import Finished, Found, Piece
from ..subject import Contender
from ..texts import Sample
from .base import Setup, added, by_candidate, of_samples, range_edges, range_sums, ratios


class Divergence:
    """KL(dense || candidate) of the answers and how often the first is the same, by position; error of states by layer.

    The error of a layer is |candidate - dense| / |dense|, the mean over tokens; layer 0 are the embeddings. A model without a
    head has no answers, and states alone are compared.
    """

    name: ClassVar[str] = "divergence"

    def why_not(self, setup: Setup) -> str | None:
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        return of_samples(self.name, setup, setup.candidates, measure, 0)

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        length = setup.settings.length
        of_candidates = {}
        for name, found in by_candidate(finished).items():
            one: Found = {
                "hidden_error": [sum(e) / len(e) for e in zip(*(f["hidden_error"] for f in found), strict=True)]
            }
            if "kl" in found[0]:
                tokens = added([f["tokens"] for f in found])
                one |= {
                    key: sum(sum(f[key]) for f in found) / sum(tokens) for key in ("kl", "same")
                } | {f"{key}_by_position": ratios(added([f[key] for f in found]), tokens) for key in ("kl", "same")}  # fmt: skip
            of_candidates[name] = one
        return {"edges": range_edges(length), "candidates": of_candidates}


@torch.inference_mode()
def measure(setup: Setup, contender: Contender, sample: Sample) -> Found:
    dense, other = setup.dense_reading(sample), setup.reading(contender, sample)
    errors = [
        float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in zip(dense.layers, other.layers, strict=True)
    ]
    if setup.subject.kind == "encoder":
        return {"hidden_error": errors}
    kl, same = [], []
    pairs = zip(answers(setup.subject.dense.model, dense.last), answers(contender.model, other.last), strict=True)
    for (_, wanted), (_, given) in pairs:
        same.append((wanted.argmax(-1) == given.argmax(-1)).double())
        wanted, given = wanted.log_softmax(-1), given.log_softmax(-1)
        # of two equal distributions rounding may give a little less than nothing
        kl.append((wanted.exp() * (wanted - given)).sum(-1).clamp(min=0).double())
    length = sample.ids.shape[1]
    positions = torch.arange(length)
    return {
        "hidden_error": errors,
        "kl": range_sums(torch.cat(kl), positions, length),
        "same": range_sums(torch.cat(same), positions, length),
        "tokens": range_sums(torch.ones(length), positions, length),
    }
