"""What a conversion did, or would do: as a dict for programs and as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import transformers

from ..models.names import STREAMING
from ..pattern import Marked, Pattern
from ..plan import build_plan, most_row_counts
from ..version import __version__
from .carry import has_tokenizer
from .check import sees_past_only
from .prepare import Prepared
from .processors import tokenizer_limits
from .source import card_metadata

# densities are counted at no greater length; patterns with more half-filled blocks a row, whose pairs must be counted one by
# one, at the shortest
SHORTEST_PLAN, LONGEST_PLAN, MOST_HALF_FILLED = 4096, 65536, 16
# for models that nothing limits
DEFAULT_LENGTH = 4096
# the word of all patterns that speak of marked tokens
MARKED = Marked.word


def describe(prepared: Prepared) -> dict:
    """The content of `conversion.json`."""
    config, work, choice = prepared.config, prepared.work, prepared.choice
    rope = getattr(config, "rope_parameters", None)
    old, new = prepared.lengths
    length = min(choice.max_length or new or DEFAULT_LENGTH, LONGEST_PLAN)
    tensors = {tensor.name: tensor for tensor in prepared.source.tensors}
    limits, tokenizer = _tokenizer(prepared)
    same = [t for name, t in tensors.items() if name not in work.changes and name not in work.left_out]
    return {
        "source": prepared.source.name,
        "origin": card_metadata(prepared.source.folder) | _base(prepared.source.repo),
        "family": prepared.family.dense_type,
        "model_type": config.model_type,
        "architectures": config.architectures,
        "sparse_attention": config.sparse_attention,
        "layers": list(_layers(prepared, length)),
        "max_length": [old, new],
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "positions": {"scheme": prepared.family.positions.scheme, "method": _method(prepared)},
        "rope_parameters": rope if choice.rope or _is_scaled(rope) else None,
        "grown": {name: [list(tensors[name].shape), list(change.shape)] for name, change in work.changes.items()},
        "new": {
            f"{name}.{parameter}": list(value.shape)
            for name, found in prepared.indexers.items()
            for parameter, value in found.named_parameters()
        },
        "left_out": {name: list(tensors[name].shape) for name in sorted(work.left_out)},
        "unchanged": {"tensors": len(same), "bytes": sum(t.size for t in same)},
        "carried": [path.relative_to(prepared.source.folder).as_posix() for path in prepared.carried],
        "tokenizer_max_length": limits,
        "tokenizer_class": tokenizer,
        "cache": None if prepared.cache is None else prepared.cache._asdict(),
        "note": _note(prepared),
        "warnings": list(prepared.warnings),
        "versions": {"sparse_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


def _base(repo: str | None) -> dict:
    """What cards call the model that was converted, where it has an id."""
    return {"base_model": repo} if repo else {}


def _is_scaled(parameters: dict | None) -> bool:
    """Do rotary angles differ from those of the base, on any kind of layers?"""
    parameters = parameters or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)


def _layers(prepared: Prepared, length: int) -> Iterator[dict]:
    """Ranges of layers that have the same pattern, and how much of the square it fills."""
    counted: dict[str, tuple[float, int]] = {}
    for stack, count in prepared.config.stacks.items():
        is_causal = sees_past_only(stack, prepared.is_causal)
        texts = [prepared.config.layer_pattern(layer, is_causal, stack) for layer in range(count)]
        first = 0
        for layer, text in enumerate(texts):
            if layer + 1 < count and texts[layer + 1] == text:
                continue
            if text not in counted:
                counted[text] = _density(text, length)
            density, tokens = counted[text]
            entry = {"stack": stack, "first": first, "last": layer, "pattern": text}
            yield {**entry, "density": density, "density_length": tokens}
            first = layer + 1


def _density(text: str, length: int) -> tuple[float, int]:
    """The share of all pairs, and the length at which it was counted. Pairs chosen at run time count as many as may be."""
    pattern = Pattern.parse(text)
    if pattern.uses_content:
        known = pattern.without_content()
        tokens = length if known is None else _density(str(known), length)[1]
        return float(most_row_counts(pattern, tokens).double().mean()) / tokens, tokens
    lengths = [length]
    while lengths[-1] > SHORTEST_PLAN:
        lengths.append(lengths[-1] // 2)
    for tokens in reversed(lengths):
        plan = build_plan(text, tokens, tokens)
        if int((~plan.full).sum()) > MOST_HALF_FILLED * plan.q_blocks:
            break
    return plan.density, tokens


def _method(prepared: Prepared) -> str | None:
    """How positions came by their new length."""
    old, new = prepared.lengths
    if old is None or old == new:
        return None
    if prepared.family.positions.scheme == "learned":
        return prepared.choice.positions
    return "computed" if prepared.family.positions.scheme == "sinusoidal" else prepared.choice.rope


def _note(prepared: Prepared) -> str | None:
    scheme, choice = prepared.family.positions.scheme, prepared.choice
    if choice.max_length is None:
        return None
    if scheme == "rotary" and not choice.rope:
        return "rotary positions have no table; only the limit was raised"
    if scheme in ("relative", "alibi", "none"):
        return "relative positions have no table and no limit; their buckets stay as they are"
    return None


def _tokenizer(prepared: Prepared) -> tuple[list[int | None] | None, list[str | None] | None]:
    """The tokenizer's limit and its class, before and after; None without a tokenizer."""
    if not has_tokenizer(prepared.carried, prepared.source.folder):
        return None, None
    limits = list(tokenizer_limits(prepared.source.folder, prepared.limit))
    found = prepared.tokenizer
    return limits, None if found is None or found.is_declared else [found.declared, found.taken]


def report_text(report: dict) -> str:
    """The same for people."""
    lines = [
        f"{report['source']}: {report['family']} -> {', '.join(report['architectures'])}",
        "Patterns, and their share of all pairs of tokens:",
        *(f"  {_layer_line(entry)}" for entry in report["layers"]),
        *_length_lines(report),
        *_new_lines(report.get("new") or {}),
        *_left_out_lines(report["left_out"]),
        f"Not touched: {report['unchanged']['tensors']:,} tensors, {report['unchanged']['bytes']:,} bytes",
    ]
    lines += _tokenizer_lines(report)
    lines += _cache_lines(report)
    lines += [f"Note: {warning}" for warning in report.get("warnings", ())]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, f"Written by {versions}", ""])


def _layer_line(entry: dict) -> str:
    first, last = entry["first"], entry["last"]
    numbers = f"layer {first}" if first == last else f"layers {first}-{last}"
    marks = ", without the marked tokens" if MARKED in entry["pattern"] else ""
    share = f"{entry['density']:.2%} of {entry['density_length']:,} tokens{marks}"
    return f"{entry['stack']} {numbers}: {entry['pattern']} ({share})".strip()


def _length_lines(report: dict) -> Iterator[str]:
    (old, new), positions = report["max_length"], report["positions"]
    if old is None:
        yield f"Length: not limited by the model ({positions['scheme']} positions)"
    elif old == new:
        yield f"Length: {old:,} tokens, as before ({positions['scheme']} positions)"
    else:
        method = f", {positions['method']}" if positions["method"] else ""
        yield f"Length: {old:,} -> {new:,} tokens ({positions['scheme']} positions{method})"
    for name, (before, after) in report["grown"].items():
        yield f"  grown: {name} {before} -> {after}"
    if report["rope_parameters"]:
        yield f"  rope_parameters: {report['rope_parameters']}"
    if report["note"]:
        yield f"  {report['note']}"


def _tokenizer_lines(report: dict) -> Iterator[str]:
    if report["tokenizer_max_length"]:
        old, new = report["tokenizer_max_length"]
        yield f"Tokenizer's limit: {_number(old)}" + (f" -> {_number(new)}" if new != old else "")
    # reports of earlier versions have no such key
    if report.get("tokenizer_class"):
        declared, taken = report["tokenizer_class"]
        named = f"the source names {declared}" if declared else "the source names none"
        yield f"Tokenizer's class: {taken}, which Transformers takes for {report['family']}; {named}"


def _cache_lines(report: dict) -> Iterator[str]:
    if (report["sparse_attention"] or {}).get("decode") == "dense":
        yield "Decoding: dense, behind a prompt that is read by the pattern"
    # reports of earlier versions have no such key
    cache = report.get("cache")
    if cache is None:
        return
    if cache["name"] == STREAMING:
        yield "Cache: generate decodes with cache_implementation='streaming', in memory that does not grow with the text"
    elif cache["name"] is not None:
        yield f"Cache: generate decodes with cache_implementation={cache['name']!r}"
    else:
        yield f"Cache: generate keeps all keys; {cache['why_not_streaming']}"


def _new_lines(new: dict) -> Iterator[str]:
    if new:
        yield f"New, of indexers that are to be trained: {len(new)} tensors, {sum(map(math.prod, new.values())):,} numbers"


def _left_out_lines(left_out: dict) -> Iterator[str]:
    if left_out:
        yield f"Left out, because the model makes them itself or has no such indexer: {len(left_out)} tensors"
        yield from (f"  {name} {shape}" for name, shape in left_out.items())


def _number(value: int | float | None) -> str:
    if value is None:
        return "none"
    # Transformers writes 10^30 for no limit
    return "none" if value > 1e20 else f"{int(value):,}"
