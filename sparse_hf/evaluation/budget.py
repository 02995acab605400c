"""What may be spent on full attention, and how wide a pattern is everywhere for the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..models.hf.kept import read_kept
from ..pattern import First, Pattern, PerHead, Window, causal
from ..pattern.forms import WindowForm, read_window
from ..plan import most_row_counts

Of = Literal["layers", "pairs", "cache", "time"]
By = Literal["layers", "heads", "both"]
Rank = Literal["answers", "text", "attention"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a model stays dense, of what, and how it is chosen.

    Args:
        share: between 0 and 1.
        of: what it is a share of: the layers (or heads) that stay dense; the pairs of query and key that the dense model
            computes; the bytes of its cache; the seconds that it takes to read a text of the longest length, measured here and now.
            Of all but layers, what the pattern itself takes is part of it, and what is chosen never takes more.
        by: what stays dense: whole layers, groups of heads that share keys, or whichever moves answers less.
        rank: by what layers are ranked: "answers" makes each local alone, a pass for each layer and question; "text" counts the
            last tokens of the texts beside the answers, so that layers that no answer needs are chosen by perplexity;
            "attention" looks at the weights on the tokens that answers copy, a pass for each question. Heads are ranked by
            attention.

    Raises:
        ValueError: a share outside 0 .. 1, an unknown word, or bytes of the cache by heads.

    Example:
        >>> Budget(share=0.25, of="pairs", by="heads").of
        'pairs'
    """

    share: float = 0.25
    of: Of = "layers"
    by: By = "layers"
    rank: Rank = "answers"

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"budget is {self.share}; it must be a share between 0 and 1")
        for name, words in (("of", Of), ("by", By), ("rank", Rank)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(words))}")
        if self.of == "cache" and self.by != "layers":
            raise ValueError(
                "a cache keeps the same tokens for all heads of a layer; choose layers (by='layers') for its bytes"
            )


def pairs_share(pattern: Pattern, length: int) -> float:
    """The share of a decoder's pairs that a pattern holds, a mean over heads; of those that are chosen by content at most."""
    if pattern.heads:
        return sum(pairs_share(head, length) for head in pattern.heads) / len(pattern.heads)
    # of whole numbers, so that a pattern that holds all of them has 1
    return int(most_row_counts(pattern & causal(), length).sum()) / (length * (length + 1) // 2)


def surely_holds_all(pattern: Pattern, length: int) -> bool:
    """Does a decoder's pattern hold all pairs of a text, whatever is chosen by content?"""
    if pattern.heads:
        return all(surely_holds_all(head, length) for head in pattern.heads)
    least = most_row_counts(pattern & causal(), length, chosen=pattern.least_chosen(length))
    return int(least.sum()) == length * (length + 1) // 2


def cache_share(pattern: Pattern, length: int) -> float:
    """The share of a text's tokens that a streaming cache keeps for a layer with this pattern."""
    kept = read_kept(str(_causal(pattern)))
    if isinstance(kept, str) or kept.left is None:
        return 1.0
    return min(length, kept.sinks + kept.left + 1) / length


def uniform(pattern: Pattern, share: float, length: int) -> Pattern | None:
    """The pattern with a wider window, that holds this share of a decoder's pairs; None where it is no window with sinks."""
    form = "" if pattern.heads else read_window(pattern & causal(), length)
    if not isinstance(form, WindowForm) or form.window is None or form.marked or form.window.left is None:
        return None
    least, most = form.window.left, length - 1
    while least < most:
        middle = (least + most + 1) // 2
        if pairs_share(_window(middle, form.first), length) <= share:
            least = middle
        else:
            most = middle - 1
    return _window(least, form.first)


def _causal(pattern: Pattern) -> Pattern:
    return PerHead(*(head & causal() for head in pattern.heads)) if pattern.heads else pattern & causal()


def _window(left: int, first: int) -> Pattern:
    return Window(left, 0) | First(first) & causal() if first else Window(left, 0)
