"""What to keep dense: layers and heads, ranked by what answers lose without them, then chosen one by one.

Legend: A tokens of an answer, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pattern import Pattern, PerHead, full
from .generation import last_alone
from .heads import copied_attention, groups_of
from .pieces import Piece, finish
from .probes.base import Setup
from .recall.ask import answer_tokens
from .recall.tasks import Question
from .subject import Contender
from .texts import tokenize

# layers that are tried in each step, the first ones of the ranking that are left
TRIED = 3
# tokens at the end of each text whose answers are compared where texts count, too
TEXT_TOKENS = 512


class Unit(NamedTuple):
    """What can stay dense: a layer, or one of its groups of heads that share keys."""

    layer: int
    group: int | None = None


@dataclass(frozen=True, eq=False)
class Search:
    """A search for what stays dense. `local` is a model of the search's own, whose pattern it sets.

    Args:
        setup: with the dense model; its settings say how much is asked.
        questions: whose answers are compared.
        local: a contender with `pattern` in every layer.
        pattern: of what is not dense.
        folder: of finished pieces, None to keep none.
        with_text: do the texts' own last tokens count as well? What they say moves by is added to what the answers do.
    """

    setup: Setup
    questions: Sequence[Question]
    local: Contender
    pattern: Pattern
    folder: Path | None
    with_text: bool = False

    @cached_property
    def layers(self) -> list[int]:
        """The layers that can be kept dense: those that are so in the dense model."""
        return [layer for layer, text in enumerate(self.dense_patterns) if text == str(full())]

    @cached_property
    def ranking(self) -> dict[int, float]:
        """Each layer with the KL of the answers when it alone is local, the greatest first."""
        # all others dense
        found = self.losses([[Unit(other) for other in self.layers if other != layer] for layer in self.layers])
        return dict(sorted(zip(self.layers, found, strict=True), key=lambda entry: -entry[1]))

    def choose(self, count: int) -> Iterator[tuple[int, float]]:
        """The layers to keep dense, one by one, each with the KL of the answers with those so far."""
        chosen: list[int] = []
        left = list(self.ranking)
        while len(chosen) < count:
            tried = left[:TRIED]
            losses = self.losses([[*map(Unit, chosen), Unit(layer)] for layer in tried])
            best = min(range(len(tried)), key=lambda i: losses[i])
            chosen.append(tried[best])
            left.remove(tried[best])
            yield tried[best], losses[best]

    @cached_property
    def copied(self) -> dict[Unit, float]:
        """Each group of heads with its weight on what answers copy from beyond the pattern, the greatest first."""
        self.lay_out(self.patterns([]))
        patterns = self.local.layer_patterns(True)
        pieces = [
            Piece(
                "tune", "heads", {"pattern": str(self.pattern), "question": one.digest}, self.weights, (i,),
                partial(self._copied, patterns, one),
            )
            for i, one in enumerate(self.questions)
        ]  # fmt: skip
        sums: dict[Unit, float] = {}
        for one in finish(pieces, self.folder, self.setup.settings.progress):
            for layer, weights in one.found["copied"]:
                for group, weight in enumerate(weights if layer in self.layers else ()):
                    sums[Unit(layer, group)] = sums.get(Unit(layer, group), 0.0) + weight / len(pieces)
        return dict(sorted(sums.items(), key=lambda entry: -entry[1]))

    def _copied(self, patterns: list[str], question: Question) -> dict[str, Any]:
        return {"copied": list(copied_attention(self.setup.subject, patterns, question).items())}

    def patterns(self, dense: Sequence[Unit]) -> list[str]:
        """The pattern of each layer if these stay dense."""
        config = self.local.config
        # layers with a window of the family's own have the pattern within it
        found = [str(config.pattern_of("", layer, self.pattern)) for layer in range(len(self.dense_patterns))]
        groups = groups_of(config)
        for layer in {unit.layer for unit in dense}:
            own = {unit.group for unit in dense if unit.layer == layer}
            found[layer] = (
                self.dense_patterns[layer] if None in own or len(own) == groups else self._by_head(own, groups)
            )
        return found

    def _by_head(self, dense: set[int | None], groups: int) -> str:
        heads = self.local.config.heads_of("")
        local = self.pattern.heads or (self.pattern,) * heads
        return str(PerHead(*(full() if head * groups // heads in dense else local[head] for head in range(heads))))

    @cached_property
    def weights(self) -> str:
        """What tells apart the weights that answers come from."""
        return f"{self.setup.subject.dense.weights} {self.local.weights}"

    @cached_property
    def dense_patterns(self) -> list[str]:
        """The pattern of each layer of the dense model, some of which may slide by themselves."""
        return self.setup.subject.dense.config.layer_patterns("")

    def losses(self, sets: Sequence[Sequence[Unit]]) -> list[float]:
        """How far answers move with each of these sets dense (KL), and what is said at the end of the texts, where that counts."""
        all_patterns = [self.patterns(dense) for dense in sets]
        asked = {"questions": [question.digest for question in self.questions]}
        found = self._moved(all_patterns, "answers", asked, self._answers)
        if not self.with_text:
            return found
        read = {"texts": [sample.digest for sample in self.setup.samples]}
        of_text = self._moved(all_patterns, "text", read, self._ends)
        return [a + b for a, b in zip(found, of_text, strict=True)]

    def _moved(
        self,
        all_patterns: Sequence[list[str]],
        name: str,
        what: dict[str, Any],
        said: Callable[[Contender], Iterator[Tensor]],
    ) -> list[float]:
        """For each set of patterns the KL of what is `said` with them, a mean over tokens and then over what it depends on."""
        pieces = [
            Piece(
                "tune", name, {"patterns": patterns, **what}, self.weights, (i,), partial(self._measured, patterns, name, said)
            )
            for i, patterns in enumerate(all_patterns)
        ]  # fmt: skip
        return [one.found["kl"] for one in finish(pieces, self.folder, self.setup.settings.progress)]

    def lay_out(self, patterns: Sequence[str]) -> None:
        """Give each layer of `local` its pattern."""
        config = self.local.config
        config.sparse_attention = config.describe(self.pattern, patterns)

    @torch.inference_mode()
    def _measured(
        self, patterns: Sequence[str], name: str, said: Callable[[Contender], Iterator[Tensor]]
    ) -> dict[str, Any]:
        self.lay_out(patterns)
        memo, key, kl = self.setup.memo, f"dense {name}", []
        if key not in memo:
            memo[key] = [found.cpu() for found in said(self.setup.subject.dense)]
        for given, whole in zip(said(self.local), memo[key], strict=True):
            wanted = whole.to(given.device)
            kl.append((wanted.exp() * (wanted - given)).sum(-1).mean())
        return {"kl": float(torch.stack(kl).mean())}

    def _answers(self, contender: Contender) -> Iterator[Tensor]:
        """The answers to all questions, of which some are read together."""
        count = self.setup.settings.batch
        for at in range(0, len(self.questions), count):
            yield from answer_logits(self.setup, contender, self.questions[at : at + count])

    def _ends(self, contender: Contender) -> Iterator[Tensor]:
        """The log-probabilities `[A, V]` at the last tokens of each text."""
        for sample in self.setup.samples:
            ids = sample.ids.to(contender.model.device)
            logits = contender.model(input_ids=ids, use_cache=False, **last_alone(contender.model, TEXT_TOKENS)).logits
            yield logits[0, -TEXT_TOKENS:].float().log_softmax(-1)


@torch.inference_mode()
def answer_logits(setup: Setup, contender: Contender, questions: Sequence[Question]) -> list[Tensor]:
    """The log-probabilities `[A, V]` that a contender gives in place of each token of each answer, given those before it."""
    model, tokens = contender.model, [_tokens(setup, one) for one in questions]
    rows, answers = [[*prompt, *answer] for prompt, answer in tokens], [answer for _, answer in tokens]
    longest = max(map(len, rows))
    # no token hears those behind it, so that padding there needs no mask
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    # of each row those of its last A + 1 tokens, of which the very last predicts none
    begins = [len(row) - len(answer) - 1 for row, answer in zip(rows, answers, strict=True)]
    logits = model(input_ids=ids, use_cache=False, **last_alone(model, longest - min(begins))).logits
    # models without that argument make all of them
    cut = longest - logits.shape[1]
    return [
        of_row[begin - cut : begin - cut + len(answer)].float().log_softmax(-1)
        for of_row, begin, answer in zip(logits, begins, answers, strict=True)
    ]


def _tokens(setup: Setup, question: Question) -> tuple[list[int], list[int]]:
    """A question's prompt and answer as tokens, made once for all sets that are tried."""
    known, tokenizer = setup.memo.setdefault("tokens", {}), setup.subject.tokenizer
    if question.digest not in known:
        known[question.digest] = tokenize(tokenizer, question.prompt), answer_tokens(tokenizer, question)
    return known[question.digest]
