"""Which layers to keep dense: ranked by what answers lose when a layer alone is made local, then chosen one by one.

Legend: A tokens of an answer, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pattern import Pattern, full
from .generation import last_alone
from .pieces import Piece, finish
from .probes.base import Setup
from .recall.ask import answer_tokens
from .recall.tasks import Question
from .subject import Contender
from .texts import tokenize

# layers that are tried in each step, the first ones of the ranking that are left
TRIED = 3


@dataclass(frozen=True, eq=False)
class Search:
    """A search for layers of `pattern` that stay dense. `local` is a model of the search's own, whose pattern it sets.

    Args:
        setup: with the dense model; its settings say how much is asked.
        questions: whose answers are compared.
        local: a contender with `pattern` in every layer.
        pattern: of layers that are not dense.
        folder: of finished pieces, None to keep none.
    """

    setup: Setup
    questions: Sequence[Question]
    local: Contender
    pattern: Pattern
    folder: Path | None

    @cached_property
    def layers(self) -> list[int]:
        """The layers that can be kept dense: those that are so in the dense model."""
        patterns = self.setup.subject.dense.config.layer_patterns("")
        return [layer for layer, text in enumerate(patterns) if text == str(full())]

    def ranking(self) -> dict[int, float]:
        """Each layer with the KL of the answers when it alone is local, the greatest first."""
        # all others dense
        found = self._losses([[other for other in self.layers if other != layer] for layer in self.layers], 0)
        return dict(sorted(zip(self.layers, found, strict=True), key=lambda entry: -entry[1]))

    def choose(self, count: int) -> Iterator[tuple[int, float]]:
        """The layers to keep dense, one by one, each with the KL of the answers with those so far."""
        chosen: list[int] = []
        left = list(self.ranking())
        while len(chosen) < count:
            tried = left[:TRIED]
            losses = self._losses([[*chosen, layer] for layer in tried], 1 + len(chosen))
            best = min(range(len(tried)), key=lambda i: losses[i])
            chosen.append(tried[best])
            left.remove(tried[best])
            yield tried[best], losses[best]

    def _losses(self, sets: Sequence[Sequence[int]], stage: int) -> list[float]:
        """The KL of the answers with each of these sets of layers dense."""
        prompts = [[question.prompt, question.answers] for question in self.questions]
        weights = f"{self.setup.subject.dense.weights} {self.local.weights}"
        pieces = [
            Piece(
                "tune", f"step {stage}", {"dense": sorted(layers), "pattern": str(self.pattern), "prompts": prompts}, weights, (i,),
                partial(self._measured, layers),
            )
            for i, layers in enumerate(sets)
        ]  # fmt: skip
        return [one.found["kl"] for one in finish(pieces, self.folder, self.setup.settings.progress)]

    @torch.inference_mode()
    def _measured(self, dense: Sequence[int]) -> dict[str, Any]:
        config, kept = self.local.config, self.setup.subject.dense.config.layer_patterns("")
        # layers with a window of the family's own have the pattern within it
        local = [str(config.pattern_of("", layer, self.pattern)) for layer in range(len(kept))]
        patterns = [kept[layer] if layer in dense else local[layer] for layer in range(len(kept))]
        config.sparse_attention = config.describe(self.pattern, patterns)
        kl = [
            (wanted.exp() * (wanted - answer_logits(self.setup, self.local, question))).sum(-1).mean()
            for question, wanted in zip(self.questions, self._dense_answers, strict=True)
        ]
        return {"kl": float(torch.stack(kl).mean())}

    @cached_property
    def _dense_answers(self) -> list[Tensor]:
        return [answer_logits(self.setup, self.setup.subject.dense, question) for question in self.questions]


@torch.inference_mode()
def answer_logits(setup: Setup, contender: Contender, question: Question) -> Tensor:
    """The log-probabilities `[A, V]` that a contender gives in place of each token of the answer, given those before it."""
    tokenizer, model = setup.subject.tokenizer, contender.model
    prompt, answer = tokenize(tokenizer, question.prompt), answer_tokens(tokenizer, question)
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    # logits of the last A + 1 tokens, of which the very last predicts none
    some = {name: len(answer) + 1 for name in last_alone(model)}
    return model(input_ids=ids, use_cache=False, **some).logits[0, -len(answer) - 1 : -1].float().log_softmax(-1).cpu()
