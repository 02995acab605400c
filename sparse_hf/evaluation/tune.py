"""`tune`: what needs to see everything, measured, and whether that is better than every n-th layer or wider windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..bench import write_json
from ..models.hf.layer_spec import as_pattern
from ..pattern import Pattern
from ..pattern.like import PatternLike
from ..units import duration
from .api import evaluate, prepare
from .budget import Budget, surely_holds_all, uniform
from .candidates import Candidate
from .choice import best_choice, evenly_spaced
from .evaluation import Evaluation, as_text
from .pieces import Found
from .probes.base import Setup
from .probes.recall import Recall
from .settings import Settings
from .texts import cut, read_texts
from .verdict import by_depth

TUNED, EVERY, UNIFORM, NONE = "tuned", "every n-th", "wider everywhere", "no layer dense"
FILE, LAYERS_FILE = "tuning.json", "layers.json"
# layers or heads that are named of a ranking
NAMED = 8


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` found: `pattern` and `layers` are what `convert` and `sparsify` take, `beats_every_nth` whether it is worth it.

    `beats_uniform` says the same of the pattern with wider windows in every layer, None where there is no such pattern. `result`
    holds rankings, steps and the figures of the held-out check, `evaluation` its report.
    """

    pattern: str
    layers: str
    beats_every_nth: bool
    beats_uniform: bool | None
    result: Found
    evaluation: Evaluation

    def __str__(self) -> str:
        return as_text(self.print)

    def print(self, console: Console) -> None:
        """Print what stays dense, and how it stands beside every n-th layer and wider windows."""
        rankings = {
            "layers whose answers suffer most when they are local, by KL": self.result["ranking"],
            "heads that look most at what answers copy (layer.group of heads), by weight": self.result["heads"],
        }
        for title, ranking in rankings.items():
            named = ", ".join(f"{what} ({value:.4f})" for what, value in ranking[:NAMED])
            if named:
                console.print(f"{title}: {named}", highlight=False)
        for one in self.result.get("patterns", ()):
            words = one.get("refused") or f"answers move by {one['answers_moved']:.4f} (KL) with {one['layers']!r}"
            console.print(f"{one['pattern']}: {words}", highlight=False)
        self.evaluation.print(console)
        if (spent := self._spent()) is not None:
            console.print(f"\n{spent}", highlight=False)
        console.print(f"\n{self.result['verdict']}", highlight=False)
        console.print(f"pattern={self.pattern!r}, layers={self.layers!r}", highlight=False)

    def _spent(self) -> str | None:
        """What the choice takes of its budget, where that is no share of the layers."""
        budget = self.result["budget"]
        if budget["of"] == "layers":
            return None
        words = f"The choice takes {budget['spent']:.1%} of the {budget['of']} of the dense model, for a budget of {budget['share']:.1%}"
        if budget["of"] != "time":
            return f"{words}."
        return (
            f"{words}: {duration(budget['chosen_s'])} of {duration(budget['dense_s'])} to read {budget['length']:,} tokens "
            f"({budget['machine']}); with no layer dense {duration(budget['local_s'])}."
        )


def tune(
    model: PreTrainedModel | str | PathLike[str],
    pattern: PatternLike | Sequence[PatternLike],
    texts: str | Path | Sequence[str | Path],
    *,
    budget: float | Budget = 0.25,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
) -> Tuning:
    """Choose the layers or heads of a decoder that stay dense while all else gets `pattern`.

    Questions of `recall` are asked about the texts. Each layer is made local alone, and layers are ranked by how far the answers
    move from the dense model's (KL on their tokens). From that ranking they are chosen one by one, each the best of the next
    three with those chosen before. Heads are ranked by their attention to what answers copy from beyond the pattern. The choice
    is then held against as many layers evenly spaced, and against a wider window in every layer that takes as many pairs, on
    other questions and on perplexity, about other texts where `settings.held_out` names some: it says when it does not beat them.

    Args:
        model: a decoder, in memory or its folder or hub id.
        pattern: of what does not stay dense. Of several, each with what the budget leaves beside it, that is taken by which answers
            move least.
        texts: as in `evaluate`.
        budget: the share of layers that stay dense, or a `Budget`: of layers, pairs, bytes of the cache or time; by layers or heads.
        tokenizer: by default that of the model's folder.
        out: a folder for finished pieces, `tuning.json`, `layers.json` (for `convert --layers`) and the report of the check; an
            interrupted run goes on from there.
        settings: how much is asked, see `Settings`; `lengths` should be those that the model will read.

    Returns:
        A `Tuning`, whose `layers` are for `convert`.

    Raises:
        ValueError: a model that says nothing, a budget outside 0 .. 1, of more layers than can be dense, or of less than the pattern
            alone takes, several patterns for a budget of layers, a pattern that chooses by content where attention ranks, indexers that
            are not trained, and as `evaluate`.

    Examples:
        >>> found = tune("my-llama", "window(1023, 0) | first(4)", [Path("contract.txt")])  # doctest: +SKIP
        >>> convert("my-llama", "out", "window(1023, 0) | first(4)", layers=found.layers)  # doctest: +SKIP
    """
    settings, budget = settings or Settings(), budget if isinstance(budget, Budget) else Budget(share=budget)
    patterns = [as_pattern(one) for one in ([pattern] if isinstance(pattern, (str, Pattern)) else pattern)]
    if not patterns or (len(patterns) > 1 and budget.of == "layers"):
        raise ValueError(
            f"{len(patterns)} patterns are given; give one, or several with a budget that counts what they take: of pairs, cache or time "
            "(--of)"
        )
    _check_leaves_out(patterns, max(settings.length, *settings.all_lengths))
    by_content = next((one for one in patterns if one.uses_content), None)
    if by_content is not None and (budget.by != "layers" or budget.rank == "attention"):
        raise ValueError(
            f"{by_content} chooses keys by content, and the attention by which heads, or layers, are ranked is told apart by positions; "
            "choose layers by what answers lose (--by layers --rank answers)"
        )
    if settings.held_out:
        # missing and empty ones are known before any weight is read
        read_texts(settings.held_out)
    setup = prepare(model, [Candidate(str(one), one) for one in patterns], texts, tokenizer, settings)
    reason = Recall().why_not(setup)
    if reason is not None:
        raise ValueError(f"tune asks questions of recall: {reason}")
    untrained = next((one.name for one in setup.candidates if one.is_untrained), None)
    if untrained is not None:
        raise ValueError(
            f"{untrained} has indexers with new weights, which choose at random; train them (sparse_hf.train.train_indexer), and tune the "
            "folder of what is trained"
        )
    check = _check_of(setup)
    folder = None if out is None else Path(out)
    choice = best_choice(setup, patterns, budget, folder)
    own, spending, chosen = choice.pattern, choice.spending, choice.found
    spaced = evenly_spaced(spending.search, chosen["count"])
    wider = uniform(own, spending.pairs(choice.dense), spending.length)
    candidates = [
        Candidate(TUNED, own, chosen["layers"]),
        Candidate(EVERY, own, spaced),
        *([Candidate(UNIFORM, wider)] if wider is not None else []),
        Candidate(NONE, own),
    ]
    # other questions than those by which it was chosen
    held_out = evaluate(
        model, candidates, settings.held_out or texts, probes=["perplexity", "recall"], tokenizer=tokenizer, out=folder,
        settings=check,
    )  # fmt: skip
    probes = held_out.result["probes"]
    beats, verdict = _verdict(probes, _count(probes["recall"], check.repeats))
    result = {
        "pattern": str(own),
        "budget": {**asdict(budget), **spending.told(choice.dense)},
        **chosen,
        "every_nth": spaced,
        "uniform": None if wider is None else str(wider),
        "beats_every_nth": beats[EVERY],
        "beats_uniform": beats.get(UNIFORM),
        "verdict": verdict,
        "held_out": held_out.result,
    }
    if folder is not None:
        write_json(result, folder / FILE)
        write_json({"pattern": str(own), "layers": chosen["layers"]}, folder / LAYERS_FILE)
    return Tuning(str(own), chosen["layers"], beats[EVERY], beats.get(UNIFORM), result, held_out)


def _check_leaves_out(patterns: Sequence[Pattern], length: int) -> None:
    """Raise ValueError for a pattern that holds all pairs of the longest text, so that no layer would be missed."""
    for pattern in patterns:
        if surely_holds_all(pattern, length):
            raise ValueError(
                f"{pattern} leaves nothing out of {length:,} tokens, so that there is nothing to choose by; ask about longer texts "
                "(--length, --lengths), or narrow the pattern"
            )


def _check_of(setup: Setup) -> Settings:
    """The settings of the check. What it cannot ask is known before anything runs.

    Raises:
        ValueError: a held-out text that is too short for them.
    """
    settings = replace(setup.settings, seed=setup.settings.seed + 1)
    if settings.held_out:
        content = read_texts(settings.held_out)
        samples = cut(content, setup.subject.tokenizer, settings)
        memo = {"tasks": setup.memo["tasks"]}
        reason = Recall().why_not(
            replace(setup, texts=tuple(content), samples=tuple(samples), settings=settings, memo=memo)
        )
        if reason is not None:
            raise ValueError(f"tune asks questions of recall about held-out texts: {reason}")
    return settings


def _verdict(probes: Found, questions: int) -> tuple[dict[str, bool], str]:
    """Does the choice beat the others? By recall, and where that differs by no more than chance by the loss on the answers."""
    recall, perplexity = probes["recall"]["candidates"], probes["perplexity"]["candidates"]
    names = [name for name in (TUNED, EVERY, UNIFORM, NONE, "dense") if name in recall]
    figures = "; ".join(
        f"{name} recalls {recall[name]['recalled']:.0%}{_at_depths(recall[name])} with loss {recall[name]['loss']:.3f}, perplexity "
        f"{perplexity[name]['perplexity']:.2f}"
        for name in names
    )

    def is_better(than: str) -> bool:
        own, other = recall[TUNED], recall[than]
        p, q = own["recalled"], other["recalled"]
        # one standard error of the difference
        chance = ((p * (1 - p) + q * (1 - q)) / questions) ** 0.5
        return p > q if abs(p - q) > chance else own["loss"] < other["loss"]

    beats = {name: is_better(name) for name in names if name in (EVERY, UNIFORM)}
    words = {
        EVERY: "as many layers that are evenly spaced",
        UNIFORM: "a wider window in every layer with as many pairs",
    }
    parts = [f"the choice {'beats' if won else 'does not beat'} {words[name]}" for name, won in beats.items()]
    advice = "" if all(beats.values()) else ": take what is best, or give more questions (repeats, tasks, lengths)"
    return beats, f"On {questions} other questions {' and '.join(parts)}{advice}. {figures[0].upper()}{figures[1:]}."


def _at_depths(recall: Found) -> str:
    """What is recalled by depth: a window recalls what stands in it, at the end of a text, and nothing else."""
    found = by_depth(recall)
    return (
        f" ({', '.join(f'{recalled:.0%} at {depth:g}' for depth, recalled in found.items())})" if len(found) > 1 else ""
    )


def _count(recall: Found, repeats: int) -> int:
    return repeats * sum(map(len, recall["candidates"][TUNED]["tasks"].values()))
