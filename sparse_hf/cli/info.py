"""`sparse-hf info`: what a sparse checkpoint does, read off its configuration; no weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..units import size
from .arguments import read_folder
from .paragraphs import print_lines

# a length at which pairs are counted, unless another is asked for
LONGEST = 16384
# of a model that nothing limits
USUAL_LENGTH = 4096


def info(
    folder: Annotated[str, typer.Argument(help="A sparse checkpoint: a folder, or a hub id.")],
    length: Annotated[
        int | None,
        typer.Option(help="Tokens to count pairs and cache bytes at; by default the model's, 16,384 at most."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a sparse checkpoint does: its pattern layer by layer, reach, lengths, cache and density."""
    with Console(stderr=True).status("counting pairs"):
        found = read_info(folder, length)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_lines(info_lines(found))


def read_info(folder: str, length: int | None) -> dict[str, Any]:
    """The facts of a folder.

    Raises:
        ValueError: a dense checkpoint, or a length below 1.
        OSError: no checkpoint, or a damaged one.
    """
    from transformers import AutoConfig

    from ..conversion.check import meta_model, sees_past_only
    from ..conversion.prepare import checkpoint_warnings
    from ..models import SparseConfigMixin, family_of
    from ..models.hf.hearing import is_causal
    from .cache_size import cache_size

    config = AutoConfig.from_pretrained(read_folder(folder, weights=False))
    if not isinstance(config, SparseConfigMixin):
        raise ValueError(
            f"{folder} is dense ({config.model_type}); `sparse-hf convert {folder} OUT --pattern PATTERN --dry-run` tells what it would be"
        )
    family = family_of(config.model_type)
    model = meta_model(family, config.to_dict())
    most = None if config.positions is None else config.positions.reach_of(config)
    counted = min(most or USUAL_LENGTH, LONGEST) if length is None else length
    causal = is_causal(model)
    stacks = []
    for stack, count in config.stacks.items():
        past = sees_past_only(stack, causal)
        texts = [config.layer_pattern(layer, past, stack) for layer in range(count)]
        stacks.append(
            {"stack": stack, "layers": count, "is_causal": past, **_stack(texts, config.layer_patterns(stack), counted)}
        )
    return {
        "folder": str(folder),
        "model_type": config.model_type,
        "architectures": config.architectures,
        "max_length": most,
        "positions": None if config.positions is None else config.positions.scheme,
        "global_token_ids": config.global_token_ids,
        "counted_at": counted,
        **dict(zip(("num_heads", "head_dim"), _heads(config), strict=True)),
        "stacks": stacks,
        "cache": cache_size(config, family, model, counted)
        if model.can_generate() and set(config.stacks) == {""}
        else None,
        "warnings": checkpoint_warnings(Path(folder), config, causal, length),
    }


def _heads(config: Any) -> tuple[int, int]:
    """Query heads, and numbers per head; of layers that differ in them, those of the first."""
    text = config.get_text_config(decoder=True)
    own = getattr(text, "per_layer_config", None)
    text = own[0] if own else text
    return text.num_attention_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _stack(texts: Sequence[str], names: Sequence[str], length: int) -> dict[str, Any]:
    """Patterns by ranges of layers, and what they come to together.

    Args:
        texts: the pattern of each layer, as it is computed.
        names: the same as they are written, not cut to the past.
    """
    from ..analysis import describe, describe_stack

    facts = {text: describe(text, length) for text in dict.fromkeys(texts)}
    ranges, layer = [], 0
    for text, group in groupby(texts):
        count = len(list(group))
        density = facts[text].density
        ranges.append({"first": layer, "last": layer + count - 1, "pattern": names[layer], "density": density})
        layer += count
    if any(facts[text].reach_note == "depends on queries and keys" for text in texts):
        layers, ahead = None, None
    else:
        found = describe_stack(_repeated(texts), length)
        layers, ahead = found.layers, found.looks_ahead
    density = sum(facts[text].density for text in texts) / len(texts)
    return {"patterns": ranges, "density": density, "layers_to_reach": layers, "looks_ahead": ahead}


def _repeated(texts: Sequence[str]) -> Sequence[str]:
    """The shortest beginning whose repetition is all of it."""
    size = next(
        size for size in range(1, len(texts) + 1) if all(texts[i] == texts[i % size] for i in range(len(texts)))
    )
    return texts[:size]


def info_lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"{found['folder']}: {found['model_type']}, {', '.join(found['architectures'] or ['no architecture named'])}"
    limit = "none" if found["max_length"] is None else f"{found['max_length']:,} tokens"
    yield f"length: {limit} ({found['positions']} positions)"
    if found["global_token_ids"]:
        yield f"marked tokens: ids {', '.join(map(str, found['global_token_ids']))}"
    at = f"at {found['counted_at']:,} tokens"
    for stack in found["stacks"]:
        yield f"{stack['stack'] or 'all'} {stack['layers']} layer(s), {stack['density']:.2%} of all pairs {at}:".strip()
        for part in stack["patterns"]:
            whose = f"{part['first']}" if part["first"] == part["last"] else f"{part['first']}-{part['last']}"
            yield f"  {whose.rjust(5)}  {part['pattern']}  ({part['density']:.2%})"
        yield f"  {_reach(stack)}"
    yield from _cache_lines(found["cache"], at)
    yield from (f"Note: {warning}" for warning in found["warnings"])


def _reach(stack: dict[str, Any]) -> str:
    needed, layers = stack["layers_to_reach"], stack["layers"]
    whom = "every other token" if stack["looks_ahead"] else "every earlier token"
    if stack["looks_ahead"] is None:
        return "reach: depends on queries and keys"
    if needed is None:
        return f"reach: tokens never reach {whom}, through however many layers"
    enough = "enough" if needed <= layers else "fewer"
    return f"reach: {needed:,} layer(s) until every token reaches {whom}; there are {layers:,}, {enough}"


def _cache_lines(cache: dict[str, Any] | None, at: str) -> Iterator[str]:
    if cache is None:
        return
    if cache["bytes"] is None:
        yield "cache of a row: not counted, since a model of this family cannot be asked without its weights"
        return
    yield f"cache of a row {at}, {cache['dtype']}: {size(cache['bytes'])} for all keys ({cache['bytes_per_token']:,} bytes a token)"
    if cache["streaming_bytes"] is None:
        yield f"  no streaming cache: {cache['why_not_streaming']}"
    else:
        yield f"  {size(cache['streaming_bytes'])} with a streaming cache"
