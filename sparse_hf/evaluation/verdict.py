"""The verdict in words: what a candidate loses, what it cannot hear, and what would bring it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..pattern import First, Pattern
from ..pattern.forms import WindowForm, read_window
from ..plan import build_plan, most_row_counts
from ..plan.heard import heard
from .layers import dense_layers
from .pieces import Found
from .probes.base import Setup
from .subject import Contender

# a text that is longer than any
LONGEST = 1 << 40
# what is lost at the most where a candidate is safe as it is: perplexity and the loss of hidden tokens, perplexity of tokens that
# need the far past, recall, answers, cosine
MOST_PERPLEXITY, MOST_LONG, LEAST_RECALL, LEAST_SAME, LEAST_COSINE = 1.02, 1.1, 0.9, 0.9, 0.98
# perplexity beyond which healing has to teach much
FAR = 1.5
# the share of layers that are named to stay dense
NAMED = 4
SAFE, HEAL, BROKEN, UNKNOWN = "safe as it is", "heal first", "not usable without long training", "nothing measured"


@dataclass(frozen=True)
class Hearing:
    """From how many tokens of a text of `length` the last token hears after all layers, the farthest `back`.

    `hears_neighbours` says whether the token beside it is among them.
    """

    length: int
    heard: int
    back: int
    hears_neighbours: bool

    @property
    def is_whole(self) -> bool:
        return self.heard == self.length


def hearing(contender: Contender, is_causal: bool, length: int) -> Hearing | None:
    """What the last token hears, or in encoders the first; None where pairs are chosen from queries and keys."""
    texts = contender.layer_patterns(is_causal)
    if any(Pattern.parse(text).uses_content for text in texts):
        return None
    marks = None
    if contender.config.global_token_ids:
        # the first token stands for those that are marked by id
        marks = torch.zeros(1, length, dtype=torch.bool)
        marks[0, 0] = True
    plans = {text: build_plan(text, length, length, marks=marks) for text in dict.fromkeys(texts)}
    token = length - 1 if is_causal else 0
    found = heard([plans[text] for text in texts], token)
    places = found.nonzero()[:, 0]
    beside = token - 1 if is_causal else 1
    return Hearing(length, int(found.sum()), int((places - token).abs().max()), bool(found[beside]))


def verdicts(setup: Setup, results: dict[str, Found]) -> list[Found]:
    """For each candidate a verdict, its reasons, what it cannot hear, and what would bring it back."""
    return [_verdict(setup, contender, results) for contender in setup.candidates]


def _verdict(setup: Setup, contender: Contender, results: dict[str, Found]) -> Found:
    losses = list(_losses(contender.name, results))
    verdict = UNKNOWN if not losses else SAFE
    if any(loss.is_too_much for loss in losses):
        verdict = BROKEN if any(loss.is_far for loss in losses) else HEAL
    reasons = [loss.text for loss in losses]
    if contender.is_untrained:
        verdict = UNKNOWN
        reasons.append(
            "its indexers have new weights and choose at random, so that this says nothing of it: train them "
            "(sparse_hf.train.train_indexer), and give the folder of what is trained as --pattern"
        )
    if losses and (longest := _longest_whole(setup, contender)) is not None:
        verdict = UNKNOWN
        reasons.append(
            f"it leaves out nothing of {longest:,} tokens, so that this says nothing of it: ask about longer texts (--length, --lengths)"
        )
    found = hearing(contender, setup.subject.is_causal, setup.settings.length)
    return {
        "candidate": contender.name,
        "verdict": verdict,
        "reasons": reasons,
        "hears": None if found is None else {"length": found.length, "tokens": found.heard, "back": found.back},
        "cannot_hear": _cannot_hear(setup, contender, found),
        "remedies": [] if verdict in (SAFE, UNKNOWN) else list(_remedies(setup, contender, results, found)),
    }


def _longest_whole(setup: Setup, contender: Contender) -> int | None:
    """The longest text that was read, where a pattern holds all pairs of it that dense attention has, and fewer of longer ones."""
    is_causal = setup.subject.is_causal
    pairs = [
        (own, dense)
        for own, dense in zip(
            contender.layer_patterns(is_causal), setup.subject.dense.layer_patterns(is_causal), strict=True
        )
        if own != dense and not _is_of_any_length(own)
    ]
    if not pairs:
        return None
    longest = max(setup.settings.length, *setup.settings.all_lengths)
    return longest if all(_is_alike(*both, longest) for both in dict.fromkeys(pairs)) else None


def _is_alike(own: str, dense: str, length: int) -> bool:
    """Do two patterns hold as many pairs? A query in the middle, which takes no time, is asked first."""
    pattern = Pattern.parse(own)
    if pattern.uses_content:
        least = most_row_counts(pattern, length, chosen=pattern.least_chosen(length))
        return torch.equal(least, most_row_counts(dense, length))
    plans, middle = [build_plan(text, length) for text in (own, dense)], length // 2
    a, b = (plan.mask(0, 0, (middle, middle + 1), (0, length)) for plan in plans)
    return torch.equal(a, b) and plans[0].density == plans[1].density


def _is_of_any_length(text: str) -> bool:
    """Does a pattern hold the whole past, however long a text is?"""
    form = read_window(Pattern.parse(text), LONGEST)
    return isinstance(form, WindowForm) and form.window is not None and form.window.left is None


@dataclass(frozen=True)
class _Loss:
    text: str
    is_too_much: bool
    is_far: bool = False


def _losses(name: str, results: dict[str, Found]):
    def of(probe: str, who: str = name) -> Any:
        return results.get(probe, {}).get("candidates", {}).get(who)

    if of("perplexity"):
        dense, own = of("perplexity", "dense")["perplexity"], of("perplexity")["perplexity"]
        yield _Loss(
            f"perplexity {own:.2f}, dense {dense:.2f} ({own / dense - 1:+.1%})",
            own / dense > MOST_PERPLEXITY,
            own / dense > FAR,
        )
    if of("longppl") and of("longppl")["perplexity"] is not None:
        dense, own = of("longppl", "dense")["perplexity"], of("longppl")["perplexity"]
        count = results["longppl"]["key_tokens"]
        yield _Loss(
            f"perplexity of {count:,} tokens that need the far past {own:.2f}, dense {dense:.2f}",
            own / dense > MOST_LONG,
        )
    if of("masked"):
        dense, own = of("masked", "dense")["accuracy"], of("masked")["accuracy"]
        yield _Loss(
            f"names {own:.1%} of hidden tokens, dense {dense:.1%}", own * MOST_PERPLEXITY < dense, own * FAR < dense
        )
    if of("recall"):
        dense, own = of("recall", "dense")["recalled"], of("recall")["recalled"]
        worst = _worst_task(of("recall"), of("recall", "dense"))
        nowhere = _nothing_at(of("recall"), of("recall", "dense"))
        text = f"recalls {own:.0%} of the facts, dense {dense:.0%}" + (f"; worst in {worst}" if worst else "")
        text += (
            f"; none of those at {', '.join(f'{depth:g}' for depth in nowhere)} of the text" if nowhere and own else ""
        )
        if dense > 0:
            yield _Loss(text, own < LEAST_RECALL * dense)
    if of("harness") and of("harness")["score"] is not None:
        dense, own = of("harness", "dense")["score"], of("harness")["score"]
        yield _Loss(
            f"scores {own:.1%} in tasks of lm-evaluation-harness, dense {dense:.1%}", own < LEAST_RECALL * dense
        )
    if of("divergence") and "same" in of("divergence"):
        same, kl = of("divergence")["same"], of("divergence")["kl"]
        yield _Loss(f"first answer the same for {same:.1%} of tokens, KL {kl:.3f}", same < LEAST_SAME)
    if of("embedding"):
        own = of("embedding")
        text = f"cosine to the dense embedding {own['cosine']:.3f}"
        text += f", order of retrieval {own['order']:.2f}" if "order" in own else ""
        yield _Loss(text, own["cosine"] < LEAST_COSINE, own["cosine"] < 0.8)


def by_depth(found: Found) -> dict[float, float]:
    """What is recalled of facts that stand at each depth of the text."""
    cells: dict[float, list[float]] = {}
    for cell in (cell for of_task in found["tasks"].values() for cell in of_task if cell["depth"] is not None):
        cells.setdefault(cell["depth"], []).append(cell["recalled"])
    return {depth: sum(values) / len(values) for depth, values in sorted(cells.items())}


def _nothing_at(own: Found, dense: Found) -> list[float]:
    """The depths of which nothing is recalled, though the dense model does: a window recalls what it sees, and looks good by it."""
    found = by_depth(dense)
    return [depth for depth, recalled in by_depth(own).items() if not recalled and found[depth]]


def _worst_task(own: Found, dense: Found) -> str | None:
    """The task in which most is lost, None if nothing is."""

    def mean(cells: Sequence[Found]) -> float:
        return sum(cell["recalled"] for cell in cells) / len(cells)

    lost = {task: mean(dense["tasks"][task]) - mean(cells) for task, cells in own["tasks"].items()}
    worst = max(lost, key=lambda task: lost[task])
    return worst if lost[worst] > 0 else None


def _cannot_hear(setup: Setup, contender: Contender, found: Hearing | None) -> str | None:
    if found is None or found.is_whole:
        return None
    who = "the last token" if setup.subject.is_causal else "the first token"
    layers = contender.config.stacks[""]
    return (
        f"through all {layers} layers {who} hears {found.heard:,} of {found.length:,} tokens, at most {found.back:,} "
        f"{'back' if setup.subject.is_causal else 'away'}: what stands elsewhere cannot change its answer"
    )


def _remedies(setup: Setup, contender: Contender, results: dict[str, Found], found: Hearing | None):
    texts = contender.layer_patterns(setup.subject.is_causal)
    sparse = [i for i, text in enumerate(texts) if not _is_like_dense(setup, text, i)]
    if not sparse:
        return
    # a layer that slides in the dense family was never trained to see more, and answers badly if it does
    whole = [i for i in range(len(texts)) if contender.config.own_window(i) is None]
    by_answers = "; `sparse-hf tune` chooses those that answers need" if setup.subject.is_causal else ""
    widened = [i for i in sparse if i not in whole and texts[i].startswith("window(None")]
    if widened:
        yield f"let layers {', '.join(map(str, widened))} slide as they do in the dense model, which never saw more there"
    worst = worst_layers(contender.name, results, sparse) if len(whole) == len(texts) else []
    if len(whole) < len(texts):
        if set(whole) & set(sparse):
            yield f"keep dense the layers that see everything in the dense model: layers={dense_layers(whole)!r}"
    elif worst:
        dense = set(range(len(texts))) - set(sparse)
        more = ", too" if dense else ""
        yield f"keep dense the layers that lose most attention{more}: layers={dense_layers({*worst, *dense})!r}{by_answers}"
    elif len(sparse) == len(texts):
        yield f"keep some layers dense{by_answers or ', every fourth to begin with'}"
    if not any(_has_global(text) for text in texts):
        yield "nothing is global: add first(4), on which models put the weight that they have no use for"
    if found is not None and not found.hears_neighbours:
        yield "not even its neighbour is heard by a token: add a narrow window, like window(15, 0), that hears the tokens between"
    elif found is not None and not found.is_whole:
        need = -(-found.length // len(texts))
        yield f"to hear {found.length:,} tokens through {len(texts)} layers takes windows of {need:,} tokens, or dense layers between"
    how = "heal it with its dense model as teacher (examples/heal.py)"
    if not setup.subject.is_causal:
        how = "train it for its task (examples/run_classification.py, run_qa.py, or run_mlm.py)"
    yield f"{how}, on texts as long as those that it will read"


def worst_layers(name: str, results: dict[str, Found], sparse: Sequence[int]) -> list[int]:
    """A quarter of the sparse layers, those that keep least attention; none where coverage did not look."""
    coverage = results.get("coverage")
    if coverage is None or name not in coverage["candidates"]:
        return []
    kept = dict(zip(coverage["layers"], coverage["candidates"][name]["by_layer"], strict=True))
    ordered = sorted((layer for layer in sparse if layer in kept), key=lambda layer: kept[layer])
    return ordered[: max(1, len(ordered) // NAMED)]


def _is_like_dense(setup: Setup, text: str, layer: int) -> bool:
    return text == setup.subject.dense.layer_patterns(setup.subject.is_causal)[layer]


def _has_global(text: str) -> bool:
    return First.word in text or "marked" in text or text.startswith("window(None")
