"""Encoders: embeddings of texts beside the dense model's, and in which order they find the text that a passage is from.

Legend: n tokens, D hidden size, T texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..pieces import Finished, Found, Piece
from ..subject import Contender
from ..texts import Sample
from .base import Setup, by_candidate, of_samples

# tokens of a passage that is looked for, and of the pieces that texts are cut into for those who read no more
PASSAGE, CHUNK = 32, 512
# what stands beside the candidates: the dense model on the first tokens, and on all of them in pieces
TRUNCATED, CHUNKED = "dense, truncated", "dense, in chunks"
# texts below which an order says nothing
LEAST_TEXTS = 3


class Embedding:
    """Mean-pooled embeddings: cosine to the dense model's, and retrieval of each text by a passage from its middle.

    Beside the candidates stand the dense model on the first 512 tokens, and its mean over pieces of 512. `found` is the share of
    passages whose text comes first; `order` is how well the ranks of all texts agree with the dense model's, 1 at best.
    """

    name: ClassVar[str] = "embedding"

    def why_not(self, setup: Setup) -> str | None:
        if setup.subject.kind == "decoder":
            return f"{type(setup.subject.dense.model).__name__} makes no embeddings; embedding asks encoders"
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        yield from of_samples(self.name, setup, setup.subject.contenders, _whole, 3)
        dense, weights = setup.subject.dense, setup.subject.dense.weights
        for s, sample in enumerate(setup.samples):
            for name, cut in ((TRUNCATED, _truncated), (CHUNKED, _chunked)):
                what = {"text": sample.name, "ids": sample.digest, "cut": name}
                yield Piece(self.name, name, what, weights, (2, s), partial(cut, setup, dense, sample))

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        found = by_candidate(finished)
        dense = torch.tensor([f["embedding"] for f in found["dense"]])
        passages = torch.tensor([f["passage"] for f in found["dense"]])
        wanted, of_candidates = passages @ dense.mT, {}
        for name, pieces in found.items():
            embeddings = torch.tensor([f["embedding"] for f in pieces])
            asked = torch.tensor([f["passage"] for f in pieces]) if "passage" in pieces[0] else passages
            scores = asked @ embeddings.mT
            one = {"cosine": float((embeddings * dense).sum(-1).mean())}
            if len(dense) >= LEAST_TEXTS:
                right = scores.argmax(-1) == torch.arange(len(scores))
                one |= {"found": float(right.double().mean()), "order": rank_agreement(scores, wanted)}
            of_candidates[name] = one
        return {"texts": len(dense), "candidates": of_candidates}


@torch.inference_mode()
def embed(contender: Contender, ids: Tensor) -> Tensor:
    """The mean over states of `ids` `[1, n]`, of length 1: `[D]`."""
    states = contender.model.base_model(input_ids=ids.to(contender.model.device)).last_hidden_state[0]
    return normalize(states.float().mean(0), dim=0).cpu()


def passage(sample: Sample) -> Tensor:
    """Tokens `[1, PASSAGE]` from the middle of a text."""
    at = max(0, sample.ids.shape[1] // 2 - PASSAGE // 2)
    return sample.ids[:, at : at + PASSAGE]


def _whole(setup: Setup, contender: Contender, sample: Sample) -> Found:
    states = setup.reading(contender, sample).last.float()
    own = normalize(states.mean(0), dim=0).cpu()
    return {"embedding": own.tolist(), "passage": embed(contender, passage(sample)).tolist()}


def _truncated(setup: Setup, dense: Contender, sample: Sample) -> Found:
    return {"embedding": embed(dense, sample.ids[:, :CHUNK]).tolist()}


def _chunked(setup: Setup, dense: Contender, sample: Sample) -> Found:
    parts = torch.stack([embed(dense, part) for part in sample.ids.split(CHUNK, 1)])
    return {"embedding": normalize(parts.mean(0), dim=0).tolist()}


def rank_agreement(scores: Tensor, wanted: Tensor) -> float:
    """Spearman's correlation of each row's ranks, the mean over rows of `[T, T]`."""
    ranks = [one.argsort(-1).argsort(-1).double() for one in (scores, wanted)]
    a, b = (one - one.mean(-1, keepdim=True) for one in ranks)
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
