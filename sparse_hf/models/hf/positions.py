"""Positions: how a family knows where a token stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Scheme = Literal["learned", "sinusoidal", "rotary", "relative", "alibi", "none"]
# what conversion to a greater length does, for people
CONVERSIONS: dict[Scheme, str] = {
    "learned": "table grown by tiled copy or interpolation",
    "sinusoidal": "table computed again",
    "rotary": "limit raised; scaled with --rope",
    "relative": "kept as it is",
    "alibi": "kept as it is",
    "none": "kept as it is",
}


# kinds of rotary angles that are other ones in a longer text
CHANGING = ("dynamic", "longrope")


@dataclass(frozen=True)
class Positions:
    """How a family knows where a token stands, and what conversion does when it gets longer.

    Attributes:
        scheme: "learned" (tables, grown), "sinusoidal" (tables, computed again), "rotary", "relative",
            "alibi" or "none" (nothing to grow).
        tables: suffixes of the state-dict keys of position tables.
        buffers: suffixes of the state-dict keys of saved buffers with one entry per position.
        offset: the first rows of a table that are no positions.
        counted: whether the configuration's limit counts those rows (RoBERTa's does, OPT's and BART's do not).
        limit: the name of the configuration's limit.
        skips_padding: whether padding takes no positions.
        checked_by_model: whether the model itself refuses ids and lengths that it cannot take.
        grows: whether a table can be made longer; of some derived families nobody knows which rows are positions.
        weighs_distances: whether layers add a number of the distance to the scores of pairs; "relative" and "alibi" always do.

    Examples:
        >>> Positions("learned", tables=("position_embeddings.weight",)).has_table, Positions("rotary").has_table
        (True, False)
    """

    scheme: Scheme
    tables: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    offset: int = 0
    counted: bool = False
    limit: str = "max_position_embeddings"
    skips_padding: bool = False
    checked_by_model: bool = False
    grows: bool = True
    weighs_distances: bool = False

    def __post_init__(self):
        if self.scheme in ("relative", "alibi"):
            object.__setattr__(self, "weighs_distances", True)

    @property
    def has_table(self) -> bool:
        """Is there a row for each position, so that no more tokens can be taken?"""
        return self.scheme in ("learned", "sinusoidal")

    def length_of(self, config: Any) -> int | None:
        """Tokens that a model takes; None where nothing limits them."""
        limit = getattr(config, self.limit, None)
        return limit - self.offset if limit is not None and self.counted else limit

    def reach_of(self, config: Any) -> int | None:
        """Tokens that a model is made for; rotary models go on beyond.

        Their limit is what angles are scaled to, if that is more than `max_position_embeddings`.
        """
        most = None if self.scheme in ("relative", "alibi", "none") else self.length_of(config)
        if most is None or self.scheme != "rotary":
            return most
        scaling = getattr(config, "rope_parameters", None) or {}
        scaling = scaling.get("full_attention", scaling)
        # some configurations keep the limit of what was trained first, and name the factor beside
        first, factor = (scaling.get(key) for key in ("original_max_position_embeddings", "factor"))
        return max(most, int(first * factor)) if first and factor else most

    @property
    def conversion(self) -> str:
        """What conversion to a greater length does, for people."""
        return CONVERSIONS[self.scheme]


ROTARY = Positions("rotary")


class ChosenPositions:
    """The `positions` of a family whose configurations choose them: those of the class, and of each by `choose`."""

    def __init__(self, of_class: Positions, choose: Callable[[Any], Positions]):
        self.of_class, self.choose = of_class, choose

    def __get__(self, config: Any, owner: type) -> Positions:
        return self.of_class if config is None else self.choose(config)


def changing_angles(config: Any) -> str | None:
    """The kind of a configuration's rotary angles that are other ones in a longer text; None if none are."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return next((kind["rope_type"] for kind in kinds if kind.get("rope_type") in CHANGING), None)


def why_not_turned(config: Any) -> str | None:
    """Why positions of the first tokens cannot be those in a cache, as far as a configuration says; None if they can."""
    scheme = None if config.positions is None else config.positions.scheme
    if scheme not in ("rotary", "none"):
        return (
            f"positions='cache' turns rotary keys, and {config.model_type} has positions that are {scheme or 'of no known kind'}, which "
            "are in the states of a token for good; use positions='true', or a rotary model"
        )
    return None


def short_length(config: Any) -> int:
    """Tokens of a text up to which angles that change are those of short texts."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    least = config.max_position_embeddings
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            known = kind.get("original_max_position_embeddings")
            least = min(least, known or getattr(config, "original_max_position_embeddings", None) or least)
    return least
