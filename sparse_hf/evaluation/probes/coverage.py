"""The attention weights that a pattern keeps of the dense model's: by layer, head and distance, and on which tokens the rest lay.

Legend: n tokens, L layers, H heads, E ranges of distances, P candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...attention import held_pairs
from ...pattern import Pattern
from ...plan import BlockPlan, build_plan
from ..mass import Pairs, Scores, kept_mass, ranges
from ..observe import layer_of, observed
from ..pieces import Finished, Found, Piece
from ..subject import Contender
from ..texts import Sample
from .base import Setup

# tokens that are named of those on which lost weight lay
NAMED = 16
# the first tokens, on which models put what they have no use for
SINKS = 4
DIGITS = 6


class Coverage:
    """Of each layer's attention weights in the dense model, the share on pairs that a candidate holds; the rest is lost.

    Shares are means over queries, each of which has a whole of 1. They say what a pattern cuts off before any layer has answered
    otherwise; what comes of it is `divergence`. Patterns that choose by content choose from the dense model's queries and keys.
    """

    name: ClassVar[str] = "coverage"

    def why_not(self, setup: Setup) -> str | None:
        by_indexer = next((one.name for one in setup.candidates if _uses_indexer(setup, one)), None)
        if by_indexer is not None:
            return f"{by_indexer!r} chooses its pairs by an indexer of its own, which the dense model does not have"
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        weights = " ".join(one.weights for one in setup.subject.contenders)
        names = [one.name for one in setup.candidates]
        for s, sample in enumerate(setup.samples):
            what = {"text": sample.name, "ids": sample.digest, "candidates": names}
            yield Piece(self.name, "", what, weights, (1, s), partial(measure, setup, sample))

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        found = [piece.found for piece in finished]
        dense = torch.tensor([f["dense"] for f in found], dtype=torch.float64).mean(0)
        of_candidates = {}
        for c, contender in enumerate(setup.candidates):
            kept = torch.tensor([f["kept"][c] for f in found], dtype=torch.float64).mean(0)
            by_layer = _share(kept.sum((1, 2)), dense.sum((1, 2)))
            of_candidates[contender.name] = {
                "kept": float(kept.sum() / dense.sum()),
                "by_layer": _rounded(by_layer),
                "by_head": [_rounded(row) for row in _share(kept.sum(2), dense.sum(2))],
                "by_distance": _rounded(_share(kept.sum((0, 1)), dense.sum((0, 1)))),
                "lost_on_first_tokens": sum(f["lost_on_first"][c] for f in found) / len(found),
                "lost_on": _most([f["lost_on"][c] for f in found]),
            }
        return {
            "distances": found[0]["distances"],
            "layers": found[0]["layers"],
            "dense_by_distance": _rounded(dense.sum((0, 1)) / dense.sum()),
            "candidates": of_candidates,
        }


def _uses_indexer(setup: Setup, contender: Contender) -> bool:
    return any(Pattern.parse(text).uses_indexer for text in contender.layer_patterns(setup.subject.is_causal))


@torch.inference_mode()
def measure(setup: Setup, sample: Sample) -> Found:
    subject = setup.subject
    watched = _Watched(setup, sample)
    with observed(subject.dense.model, watched.see):
        setup.passes.forget()
        options = {"use_cache": False} if subject.is_causal else {}
        subject.dense.model.base_model(input_ids=sample.ids.to(subject.device), **options)
    if not watched.layers:
        raise ValueError(
            f"no layer of {type(subject.dense.model).__name__} has attention that coverage can see; leave it out"
        )
    lost = watched.lost
    return {
        "distances": ranges(sample.ids.shape[1]),
        "layers": list(watched.layers),
        "dense": [_listed(dense) for dense, _ in watched.layers.values()],
        "kept": [[_listed(kept[c]) for _, kept in watched.layers.values()] for c in range(len(setup.candidates))],
        "lost_on_first": [float(one[:SINKS].sum() / max(float(one.sum()), 1e-9)) for one in lost],
        "lost_on": [_named(one, sample, setup) for one in lost],
    }


@dataclass(eq=False)
class _Watched:
    """What was seen of each layer: by its number, dense weights `[H, E]` and kept ones `[P, H, E]`, shares of 1."""

    setup: Setup
    sample: Sample
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lost: Tensor = field(init=False)
    plans: dict[str, BlockPlan] = field(default_factory=dict)

    def __post_init__(self):
        self.lost = torch.zeros(len(self.setup.candidates), self.sample.ids.shape[1], dtype=torch.float64)

    def see(self, module: Any, q: Tensor, k: Tensor, arguments: dict[str, Any]) -> None:
        # attention to another text is not what patterns speak of
        if q.shape[2] != k.shape[2]:
            return
        if arguments.get("position_bias") is not None and arguments["position_bias"].numel():
            raise NotImplementedError("coverage knows no bias by distance; leave it out of the probes")
        number = layer_of(module, len(self.layers))
        scores = Scores.of(q, arguments)
        own, *pairs = (
            self._pairs(one, module, q, k, scores) for one in (self.setup.subject.dense, *self.setup.candidates)
        )
        mass = kept_mass(q[0], k[0], scores, own, pairs, self.setup.subject.is_causal)
        whole = mass.queries
        self.layers[number] = mass.dense / whole, mass.kept / whole
        self.lost += mass.lost

    def _pairs(self, contender: Contender, module: Any, q: Tensor, k: Tensor, scores: Scores) -> Pairs:
        """The pairs of a candidate's layer; layers that share their weights do not know which they are."""
        text = contender.config.layer_pattern(module.__dict__.get("layer_idx"), self.setup.subject.is_causal)
        marked = contender.config.global_token_ids
        if Pattern.parse(text).uses_content:
            return held_pairs(q[:1], k[:1], text, scores.scale, scores.softcap, self._marks(marked, q.device))
        key = f"{text} {marked}"
        if key not in self.plans:
            length, marks = self.sample.ids.shape[1], self._marks(marked, q.device)
            self.plans[key] = build_plan(text, length, length, marks=marks, device=q.device)
        return self.plans[key]

    def _marks(self, marked: Sequence[int], device: torch.device) -> Tensor | None:
        return torch.isin(self.sample.ids, torch.tensor(marked)).to(device) if marked else None


def _named(lost: Tensor, sample: Sample, setup: Setup) -> list[list[Any]]:
    """The tokens on which most of the lost weight lay, as they are written, each with its share of it."""
    whole = max(float(lost.sum()), 1e-9)
    by_token: Counter[int] = Counter()
    for token, weight in zip(sample.ids[0].tolist(), lost.tolist(), strict=True):
        by_token[token] += weight
    decode = setup.subject.tokenizer.decode
    return [[decode([token]), weight / whole] for token, weight in by_token.most_common(NAMED) if weight > 0]


def _most(lists: list[list[list[Any]]]) -> list[list[Any]]:
    """Tokens with their shares, the mean over texts."""
    by_token: Counter[str] = Counter()
    for token, share in (entry for one in lists for entry in one):
        by_token[token] += share / len(lists)
    return [[token, round(share, DIGITS)] for token, share in by_token.most_common(NAMED)]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Quotients, 1 where there is nothing to keep."""
    return torch.where(whole > 0, part / whole.clamp(min=1e-12), 1.0)


def _listed(values: Tensor) -> list:
    return [[round(value, DIGITS + 2) for value in row] for row in values.tolist()]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
