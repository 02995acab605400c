"""Which layer has which pattern: the `layers` argument, read into one pattern per layer.

A stack is a row of layers: "" in most models, "encoder" and "decoder" in models that have both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...pattern import Pattern, full

DENSE = "dense"
_RANGE = r"\d+\s*(?:-\s*\d*\s*(?:/\s*\d+)?)?"
_ENTRY = rf"(?:(?:encoder|decoder)\s*(?:{_RANGE})?|{_RANGE})\s*="
_WHERE = re.compile(r"\s*(encoder|decoder)?\s*(?:(\d+)\s*(?:(-)\s*(\d*)\s*(?:/\s*([1-9]\d*))?)?)?\s*")


def parse_layers(layers, num_layers: int, pattern) -> list[Pattern]:
    """One pattern per layer of a model with one stack.

    Args:
        layers: None (the same everywhere); a text like `"0-3=dense, 8=window(64, 0), 20-=dense"` with inclusive ranges,
            where `dense` is full attention and layers that are not named take `pattern`; `"0-/2=dense"` names every second
            layer; a dict from such a range or a layer number to a pattern; or a sequence with one pattern per layer.
        num_layers: layers of the model.
        pattern: a `Pattern` or its text.

    Raises:
        ValueError: a range outside the model, a layer named twice, or a wrong number of patterns.
    """
    named, pattern = named_layers(layers, {"": num_layers}), as_pattern(pattern)
    return [named.get(("", layer), pattern) for layer in range(num_layers)]


def named_layers(layers, stacks: Mapping[str, int]) -> dict[tuple[str, int], Pattern]:
    """The layers that `layers` names, (stack, layer) -> pattern; `stacks` gives the number of layers of each stack."""
    if layers is None:
        return {}
    if isinstance(layers, str):
        layers = dict(_split_spec(layers))
    if not isinstance(layers, Mapping):
        return _listed(list(layers), stacks)
    chosen: dict[tuple[str, int], Pattern] = {}
    for where, what in layers.items():
        if isinstance(what, Sequence) and not isinstance(what, str) and where in stacks:
            chosen |= _listed(list(what), {where: stacks[where]})
            continue
        for place in _places(where, stacks):
            if place in chosen:
                raise ValueError(f"layers names {_spell(place)} twice")
            chosen[place] = as_pattern(what)
    return chosen


def _listed(patterns: list, stacks: Mapping[str, int]) -> dict[tuple[str, int], Pattern]:
    if len(stacks) > 1:
        raise ValueError("layers is one list; an encoder-decoder takes {'encoder': [...], 'decoder': [...]}")
    ((stack, num_layers),) = stacks.items()
    if len(patterns) != num_layers:
        raise ValueError(
            f"layers has {len(patterns)} patterns; the model has {num_layers} {stack} layers".replace("  ", " ")
        )
    return {(stack, layer): as_pattern(p) for layer, p in enumerate(patterns)}


def _split_spec(text: str):
    # commas also stand inside patterns, so an entry ends where the next `range=` begins
    for entry in re.split(rf",\s*(?={_ENTRY})", text.strip()):
        where, equals, what = entry.partition("=")
        if not equals or not what.strip():
            raise ValueError(
                f"layers: cannot read {entry.strip()!r}; write RANGE=PATTERN, like '0-3=dense, 8=window(64, 0)'"
            )
        yield where.strip(), what.strip()


def _places(where, stacks: Mapping[str, int]) -> list[tuple[str, int]]:
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


def _spell(place: tuple[str, int]) -> str:
    return f"{place[0]} layer {place[1]}".strip()


def as_pattern(what) -> Pattern:
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
