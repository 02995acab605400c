"""Which layer has which pattern: the `layers` argument, read into one pattern per layer.

A stack is a sequence of layers: "" in most models, "encoder" and "decoder" in models that have both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ...pattern import Pattern, full
from ...pattern.like import PatternLike

logger = logging.get_logger(__name__)

# which layers have which pattern, see `parse_layers`
LayersLike = None | str | Mapping[str | int, "PatternLike | Sequence[PatternLike]"] | Sequence[PatternLike]
DENSE = "dense"
_RANGE = r"\d+\s*(?:-\s*\d*\s*(?:/\s*\d+)?)?"
_ENTRY = rf"(?:(?:encoder|decoder)\s*(?:{_RANGE})?|{_RANGE})\s*="
_WHERE = re.compile(r"\s*(encoder|decoder)?\s*(?:(\d+)\s*(?:(-)\s*(\d*)\s*(?:/\s*([1-9]\d*))?)?)?\s*")


def parse_layers(layers: LayersLike, num_layers: int, pattern: PatternLike) -> list[Pattern]:
    """One pattern per layer of a model with one stack.

    Args:
        layers: None (the same everywhere); a text like `"0-3=dense, 8=window(64, 0), 20-=dense"` with inclusive ranges,
            where `dense` is full attention and layers that are not named take `pattern`; `"0-/2=dense"` names every second
            layer; a dict from such a range or a layer number to a pattern; or a sequence with one pattern per layer.
        num_layers: layers of the model.
        pattern: a `Pattern` or its text.

    Raises:
        ValueError: a range outside the model, a layer named twice, or a wrong number of patterns.

    Examples:
        >>> [str(pattern) for pattern in parse_layers("0=dense", 2, "window(64, 64)")]
        ['window(None, None)', 'window(64, 64)']
    """
    named, others = named_layers(layers, {"": num_layers}), as_pattern(pattern)
    return [named.get(("", layer), others) for layer in range(num_layers)]


def named_layers(layers: LayersLike, stacks: Mapping[str, int]) -> dict[tuple[str, int], Pattern]:
    """The layers that `layers` names, (stack, layer) -> pattern; `stacks` gives the number of layers of each stack."""
    if layers is None:
        return {}
    if isinstance(layers, str):
        layers = dict(_split_spec(layers))
    if not isinstance(layers, Mapping):
        return _listed(list(layers), stacks)
    chosen: dict[tuple[str, int], Pattern] = {}
    for where, what in layers.items():
        if not isinstance(what, (str, Pattern)):
            if not isinstance(where, str) or where not in stacks:
                raise ValueError(f"layers: {where!r} has {what!r}; a layer or a range takes one pattern")
            chosen |= _listed(list(what), {where: stacks[where]})
            continue
        for layer in _range(where, stacks):
            if layer in chosen:
                raise ValueError(f"layers names {_spell(layer)} twice")
            chosen[layer] = as_pattern(what)
    return chosen


def _listed(patterns: list[PatternLike], stacks: Mapping[str, int]) -> dict[tuple[str, int], Pattern]:
    if len(stacks) > 1:
        raise ValueError("layers is one list; an encoder-decoder takes {'encoder': [...], 'decoder': [...]}")
    ((stack, num_layers),) = stacks.items()
    if len(patterns) != num_layers:
        raise ValueError(
            f"layers has {len(patterns)} patterns; the model has {num_layers} {stack} layers".replace("  ", " ")
        )
    return {(stack, layer): as_pattern(p) for layer, p in enumerate(patterns)}


def _split_spec(text: str) -> Iterator[tuple[str, str]]:
    # commas also stand inside patterns, so an entry ends where the next `range=` begins
    for entry in re.split(rf",\s*(?={_ENTRY})", text.strip()):
        where, equals, what = entry.partition("=")
        if not equals or not what.strip():
            raise ValueError(
                f"layers: cannot read {entry.strip()!r}; write RANGE=PATTERN, like '0-3=dense, 8=window(64, 0)'"
            )
        yield where.strip(), what.strip()


def _range(where: str | int, stacks: Mapping[str, int]) -> list[tuple[str, int]]:
    """The layers of a range like `encoder 0-3`."""
    match = _WHERE.fullmatch(str(where))
    if not match or not str(where).strip():
        raise ValueError(f"layers: {where!r} is not a layer or a range; write 8, 0-3 or 20-")
    stack = match[1] or ""
    if stack not in stacks:
        names = " and ".join(name for name in stacks if name)
        raise ValueError(
            f"layers: {where!r} does not say which stack; the model has {names}: write 'encoder 0-3' or 'decoder'"
            if names
            else f"layers: {where!r} speaks of the {stack}; the model has one stack of layers: write 8, 0-3 or 20-"
        )
    count = stacks[stack]
    if match[2] is None:
        return [(stack, layer) for layer in range(count)]
    first = int(match[2])
    last = first if not match[3] else int(match[4]) if match[4] else count - 1
    if first > last or last >= count:
        raise ValueError(f"layers: {where!r} is outside the model, which has layers 0-{count - 1}")
    return [(stack, layer) for layer in range(first, last + 1, int(match[5] or 1))]


def _spell(layer: tuple[str, int]) -> str:
    return f"{layer[0]} layer {layer[1]}".strip()


def as_pattern(what: PatternLike) -> Pattern:
    """A pattern, from its text or from "dense"."""
    if isinstance(what, Pattern):
        return what
    return full() if what == DENSE else Pattern.parse(what)


def describe_layers(
    layers: Mapping[tuple[str, int], Pattern], pattern: Pattern, global_token_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """The value of `sparse_attention` for these layers, with a name for each distinct pattern."""
    names: dict[Pattern, str] = {}
    for p in layers.values():
        if p not in names:
            names[p] = "sparse" if p == pattern else DENSE if p == full() else f"pattern_{len(names)}"
    listed: dict[str, list[str]] = {}
    for (stack, _), p in layers.items():
        listed.setdefault(stack, []).append(names[p])
    return {
        "patterns": {name: str(p) for p, name in names.items()},
        "layers": listed.get("", listed),
        "global_token_ids": list(global_token_ids),
    }


def name_of(names: Sequence[str], layer: int, stack: str = "") -> str:
    """The name of a layer's pattern. Layers beyond the names take the one pattern that all others have.

    Raises:
        ValueError: there is more than one.
    """
    if layer < len(names):
        return names[layer]
    if len(set(names)) == 1:
        return names[0]
    raise ValueError(
        f"sparse_attention.layers names {len(names)} {stack} layers, of different patterns, and a layer has the number {layer} "
        "(layer_idx): name a pattern for each layer in config.sparse_attention['layers'], and number them from 0".replace(
            "  ", " "
        )
    )


def fit_names(names: Sequence[str], count: int, numbers: Sequence[int] | None, stack: str = "") -> list[str]:
    """The names of the patterns of `count` layers, of which the i-th has the number `numbers[i]`, by default i.

    Raises:
        ValueError: layers beyond the names, which have more than one pattern.
    """
    if numbers is None or len(numbers) != count:
        numbers = range(count)
    fitted = [name_of(names, number, stack) for number in numbers]
    if fitted != list(names) and len(set(names)) > 1:
        logger.warning_once(
            f"sparse_attention.layers named {len(names)} {stack} layers, and the model has {count}, with the numbers "
            f"{', '.join(map(str, numbers))}: the names of their patterns are {fitted}".replace("  ", " ")
        )
    return fitted
