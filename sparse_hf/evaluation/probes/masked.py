"""Masked language models: how many hidden tokens they name, by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch.nn.functional import cross_entropy

from ..passes import answers, read
from ..pieces import Finished, Found, Piece
from ..subject import Contender
from ..texts import Sample
from .base import Setup, added, by_candidate, of_samples, range_edges, range_sums, ratios

# tokens that are hidden, as in training
SHARE = 0.15


class Masked:
    """15 % of the tokens are hidden, the same ones from every candidate: how many are named, and with what loss."""

    name: ClassVar[str] = "masked"

    def why_not(self, setup: Setup) -> str | None:
        if setup.subject.kind != "masked":
            return f"{type(setup.subject.dense.model).__name__} names no hidden tokens; masked asks models ForMaskedLM"
        if setup.subject.tokenizer.mask_token_id is None:
            return "the tokenizer has no mask token; give that of the masked language model"
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        return of_samples(self.name, setup, setup.subject.contenders, measure, 2, seed=setup.settings.seed)

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        of_contenders = {}
        for name, found in by_candidate(finished).items():
            tokens = added([f["tokens"] for f in found])
            right = added([f["right"] for f in found])
            of_contenders[name] = {
                "accuracy": sum(right) / sum(tokens),
                "loss": sum(sum(f["loss"]) for f in found) / sum(tokens),
                "by_position": ratios(right, tokens),
            }
        return {"edges": range_edges(setup.settings.length), "candidates": of_contenders}


@torch.inference_mode()
def measure(setup: Setup, contender: Contender, sample: Sample) -> Found:
    tokenizer, length = setup.subject.tokenizer, sample.ids.shape[1]
    hidden = hidden_tokens(sample, tokenizer.all_special_ids, setup.settings.seed)
    ids = sample.ids.clone()
    mask = tokenizer.mask_token_id
    assert isinstance(mask, int)
    ids[0, hidden] = mask
    states = read(contender.model, ids).last[hidden.to(contender.model.device)]
    losses, right = [], []
    for start, logits in answers(contender.model, states):
        wanted = sample.ids[0, hidden[start : start + len(logits)]].to(logits.device)
        losses.append(cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return {
        "loss": range_sums(torch.cat(losses), hidden, length),
        "right": range_sums(torch.cat(right), hidden, length),
        "tokens": range_sums(torch.ones(len(hidden)), hidden, length),
    }


def hidden_tokens(sample: Sample, special: Sequence[int], seed: int) -> torch.Tensor:
    """The tokens that are hidden, ascending: none that is special, and at least one."""
    real = (~torch.isin(sample.ids[0], torch.tensor(list(special)))).nonzero()[:, 0]
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    return real[order[: max(1, round(SHARE * len(real)))]].sort().values
