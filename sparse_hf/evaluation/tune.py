"""`tune`: which layers need to see everything, measured, and whether that is better than every n-th."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..bench import write_json
from ..models.hf.layer_spec import as_pattern
from ..pattern.like import PatternLike
from .api import PIECES, evaluate, prepare
from .candidates import Candidate
from .evaluation import Evaluation, as_text
from .layers import dense_layers
from .pieces import Found
from .probes.recall import Recall, questions_of
from .search import Search
from .settings import Settings

TUNED, EVERY, NONE = "tuned", "every n-th", "no layer dense"
FILE = "tuning.json"


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` found: `layers` is what `convert` and `sparsify` take, `beats_every_nth` whether it is worth it.

    `result` holds ranking, steps and the figures of the held-out check, `evaluation` its report.
    """

    layers: str
    beats_every_nth: bool
    result: Found
    evaluation: Evaluation

    def __str__(self) -> str:
        return as_text(self.print)

    def print(self, console: Console) -> None:
        """Print the layers, and how they stand beside every n-th."""
        ranking = ", ".join(f"{layer} ({kl:.4f})" for layer, kl in self.result["ranking"][:8])
        console.print(f"layers whose answers suffer most when they are local, by KL: {ranking}", highlight=False)
        self.evaluation.print(console)
        console.print(f"\n{self.result['verdict']}", highlight=False)
        console.print(f"layers={self.layers!r}", highlight=False)


def tune(
    model: PreTrainedModel | str | PathLike[str],
    pattern: PatternLike,
    texts: str | Path | Sequence[str | Path],
    *,
    budget: float = 0.25,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
) -> Tuning:
    """Choose the layers of a decoder that stay dense while the others get `pattern`.

    Questions of `recall` are asked about the texts. Each layer is made local alone, and layers are ranked by how far the answers
    move from the dense model's (KL on their tokens). From that ranking they are chosen one by one, each the best of the next
    three with those chosen before. The choice is then held against as many layers evenly spaced, on other questions and on
    perplexity: it says when it does not beat them.

    Args:
        model: a decoder, in memory or its folder or hub id.
        pattern: of the layers that do not stay dense.
        texts: as in `evaluate`.
        budget: the share of layers that stay dense.
        tokenizer: by default that of the model's folder.
        out: a folder for finished pieces, `tuning.json` and the report of the check; an interrupted run goes on from there.
        settings: how much is asked, see `Settings`; `lengths` should be those that the model will read.

    Returns:
        A `Tuning`, whose `layers` are for `convert`.

    Raises:
        ValueError: a model that says nothing, a budget outside 0 .. 1 or of more layers than can be dense, and as `evaluate`.

    Examples:
        >>> found = tune("my-llama", "window(1023, 0) | first(4)", [Path("contract.txt")])  # doctest: +SKIP
        >>> convert("my-llama", "out", "window(1023, 0) | first(4)", layers=found.layers)  # doctest: +SKIP
    """
    settings = settings or Settings()
    if not 0 < budget < 1:
        raise ValueError(f"budget is {budget}; it must be the share of layers that stay dense, between 0 and 1")
    setup = prepare(model, [Candidate("local", as_pattern(pattern))], texts, tokenizer, settings)
    reason = Recall().why_not(setup)
    if reason is not None:
        raise ValueError(f"tune asks questions of recall: {reason}")
    folder = None if out is None else Path(out)
    questions = [question for _, question in questions_of(setup)]
    search = Search(
        setup, questions, setup.candidates[-1], as_pattern(pattern), None if folder is None else folder / PIECES
    )
    count = max(1, round(budget * setup.subject.dense.config.stacks[""]))
    if count > len(search.layers):
        raise ValueError(
            f"a budget of {budget} is {count} dense layers, and {len(search.layers)} can be dense; lower it"
        )
    ranking, steps = search.ranking(), list(search.choose(count))
    chosen = sorted(layer for layer, _ in steps)
    spaced = [search.layers[i * len(search.layers) // count] for i in range(count)]
    held_out = evaluate(
        model,
        [
            Candidate(TUNED, pattern, dense_layers(chosen)),
            Candidate(EVERY, pattern, dense_layers(spaced)),
            Candidate(NONE, pattern),
        ],
        texts,
        probes=["perplexity", "recall"],
        tokenizer=tokenizer,
        out=folder,
        # other questions than those by which layers were chosen
        settings=replace(settings, seed=settings.seed + 1),
    )
    beats, verdict = _verdict(held_out.result["probes"])
    result = {
        "pattern": str(as_pattern(pattern)),
        "budget": budget,
        "layers": dense_layers(chosen),
        "every_nth": dense_layers(spaced),
        "ranking": [[layer, kl] for layer, kl in ranking.items()],
        "steps": [[layer, kl] for layer, kl in steps],
        "beats_every_nth": beats,
        "verdict": verdict,
        "held_out": held_out.result,
    }
    if folder is not None:
        write_json(result, folder / FILE)
    return Tuning(dense_layers(chosen), beats, result, held_out)


def _verdict(probes: Found) -> tuple[bool, str]:
    """Does the choice beat layers that are evenly spaced? By recall, and where that is equal by the loss on the answers."""
    recall, perplexity = probes["recall"]["candidates"], probes["perplexity"]["candidates"]
    (own, other), words = (recall[TUNED], recall[EVERY]), []
    for name in (TUNED, EVERY, NONE, "dense"):
        words.append(
            f"{name} recalls {recall[name]['recalled']:.0%} with loss {recall[name]['loss']:.3f}, perplexity "
            f"{perplexity[name]['perplexity']:.2f}"
        )
    beats = (own["recalled"], -own["loss"]) > (other["recalled"], -other["loss"])
    first = (
        "the chosen layers beat as many that are evenly spaced"
        if beats
        else (
            "the chosen layers do not beat as many that are evenly spaced: take those, or give more questions (repeats, tasks, lengths)"
        )
    )
    return beats, f"On other questions {first}. {'; '.join(words)}."
