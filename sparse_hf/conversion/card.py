"""`card`: the README.md of a sparse checkpoint, as model hubs show it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from rich.console import Console

from ..analysis.show import describe, render, save_png
from ..models.hf.config import SparseConfigMixin
from ..models.hf.hearing import is_causal
from ..models.hf.register import Family, family_of
from ..models.hf.remote_code import auto_map
from ..version import HOW_TO_INSTALL
from .carry import CARD, read_json
from .check import meta_model, sees_past_only, sparse_config
from .hub import is_id
from .prepare import REPORT, mark_warnings
from .report import report_text
from .source import card_metadata, check_folder

PICTURE, RESULTS = "pattern.png", "results.json"
NOT_MEASURED = """## Measured

Not evaluated: nobody has measured what this model loses by its pattern. `sparse-hf evaluate` does, on texts of yours.
"""
# numbers of the pattern are given for no greater length, which would take long to count
LONGEST, DEFAULT_LENGTH = 16384, 4096
# Auto class -> what hubs call the task, the most telling first
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModel": "feature-extraction",
}
BODY = """
# {name}

{summary}

```python
import sparse_hf
from transformers import {auto}

model = {auto}.from_pretrained("{address}")
```

{install} Where the import cannot be added, `trust_remote_code=True` finds the same classes:

```python
model = {auto}.from_pretrained("{address}", trust_remote_code=True)
```

## The pattern at {length:,} tokens

| layers | pattern | pairs | of all | keys per query, mean | layers until every token hears |
|---|---|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Span:
    """Layers that share a pattern: `counted` is what of it the model uses, its past if it is causal."""

    layers: str
    pattern: str
    counted: str


@dataclass(frozen=True)
class Card:
    """All that a card says.

    `results` maps a figure's name to a number, or to {"sparse": ..., "dense": ...}; its "note" says how they were measured.
    Where its "dataset" says on what, numbers of the sparse model go into the metadata, as `model-index`, for hubs to list.
    """

    name: str
    family: str
    auto: str
    length: int
    spans: tuple[Span, ...]
    base: str | None = None
    license: str | None = None
    note: str = ""
    warnings: tuple[str, ...] = ()
    conversion: str = ""
    picture: str = ""
    results: Mapping | None = None
    address: str | None = None


def write_card(
    folder: str | Path,
    *,
    base: str | None = None,
    results: Mapping | None = None,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the README.md of a sparse checkpoint, and `pattern.png` beside it if matplotlib is installed.

    Args:
        folder: a checkpoint that `convert` or a sparse model's `save_pretrained` wrote.
        base: the dense model, a hub id, or a folder whose README.md names its license and its own base; by
            default what the old README.md and `conversion.json` say.
        results: measured figures, see `Card`; by default those of `results.json` in the folder.
        address: what readers load it by, such as the hub id that it will have; by default a path that stands for theirs.
        overwrite: replace a README.md that is there.

    Raises:
        FileNotFoundError: no checkpoint.
        FileExistsError: there is a README.md.
        ValueError: the checkpoint is not sparse.

    Examples:
        >>> from sparse_hf import convert
        >>> sparse = convert("my-bert", "sparse", "window(128, 128) | first(1)", progress=False)
        >>> write_card(sparse, base="owner/my-bert").name
        'README.md'
    """
    folder = Path(folder)
    check_sparse(folder)
    path = folder / CARD
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True (--overwrite) to replace it")
    card = replace(_read(folder, base, results), address=address)
    content = card_text(card)
    # raises if a hub could not read the metadata
    ModelCard(content)
    partial = folder / f".{CARD}.partial-{os.getpid()}"
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
    return path


def check_sparse(folder: Path) -> None:
    """Refuse a folder that is no sparse checkpoint.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a dense or a damaged one.
    """
    check_folder(folder, weights=False)
    model_type = read_json(folder / "config.json").get("model_type", "")
    if model_type != family_of(model_type).sparse_type:
        raise ValueError(f"{folder} is {model_type}, which is dense; convert it first (sparse-hf convert)")


def card_text(card: Card) -> str:
    """The whole file: metadata, then text."""
    data = ModelCardData(
        license=card.license,
        base_model=card.base,
        library_name="transformers",
        pipeline_tag=TASKS.get(card.auto),
        tags=["sparse-attention", "long-context", "sparse_hf", card.family],
        **_model_index(card),
    )
    sparse = ", ".join(f"`{text}`" for text in dict.fromkeys(span.pattern for span in card.spans))
    origin = (
        f"[{card.base}](https://huggingface.co/{card.base})" if card.base else f"A model of the family {card.family}"
    )
    summary = f"{origin} with sparse attention by sparse_hf: {sparse}. {card.note}".rstrip()
    summary += "".join(f"\n\n> {warning}" for warning in card.warnings)
    rows = "\n".join(_row(span, card.length) for span in card.spans)
    body = BODY.format(
        name=card.name, summary=summary, auto=card.auto, address=card.address or f"path/to/{card.name}", install=HOW_TO_INSTALL,
        length=card.length, rows=rows,
    )  # fmt: skip
    parts = [body, card.picture]
    if card.conversion:
        parts.append(f"## The conversion\n\n```text\n{card.conversion.rstrip()}\n```\n")
    parts.append(_measured(card.results) if card.results else NOT_MEASURED)
    return f"---\n{data.to_yaml().strip()}\n---\n" + "\n".join(part for part in parts if part)


# a pattern is counted for its row and again for the choice of the picture
_facts = lru_cache(maxsize=32)(describe)


def _row(span: Span, length: int) -> str:
    facts = _facts(span.counted, length)
    # a bar inside a table's cell would end it
    pattern = span.pattern.replace("|", "\\|")
    mean = f"{facts.keys_per_query[1]:,.0f}"
    return f"| {span.layers} | `{pattern}` | {facts.pairs:,} | {facts.density:.2%} | {mean} | {facts.reach_note} |"


def _model_index(card: Card) -> dict:
    """What hubs list of the figures: those of the sparse model that are numbers."""
    results, task = card.results or {}, TASKS.get(card.auto)
    dataset = results.get("dataset")
    if dataset is None or task is None:
        return {}
    found = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )  # fmt: skip
        for name, figure in _figures(results)
        if isinstance(value := figure.get("sparse"), int | float)
    ]
    return {"model_name": card.name, "eval_results": found} if found else {}


def _figures(results: Mapping) -> Iterator[tuple[str, Mapping]]:
    """Names of figures, each with those of the sparse model and of the dense one."""
    for name, figure in results.items():
        if name not in ("note", "dataset"):
            yield name, figure if isinstance(figure, Mapping) else {"sparse": figure}


def _measured(results: Mapping) -> str:
    lines = ["## Measured", "", *([results["note"], ""] if "note" in results else [])]
    lines += ["| | sparse | dense |", "|---|---|---|"]
    lines += [f"| {name} | {_number(f.get('sparse'))} | {_number(f.get('dense'))} |" for name, f in _figures(results)]
    return "\n".join(lines) + "\n"


def _number(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _read(folder: Path, base: str | None, results: Mapping | None) -> Card:
    stored = read_json(folder / "config.json")
    family = family_of(stored["model_type"])
    config = sparse_config(family, stored)
    model = meta_model(family, stored)
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    limit = report.get("density_length") or getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    length, spans = min(limit, LONGEST), _spans(config, is_causal(model))
    if results is None and (folder / RESULTS).is_file():
        results = read_json(folder / RESULTS)
    known, head = _origin(folder, report, base), type(model).__name__
    warnings = tuple(mark_warnings(config, family, [family.architectures.get(head, head)]))
    # said above the table, and once
    report["warnings"] = [warning for warning in report.get("warnings", ()) if warning not in warnings]
    return Card(
        name=folder.resolve().name,
        family=family.dense_type,
        auto=_auto_class(config, family, head),
        length=length,
        spans=spans,
        base=known.get("base_model"),
        license=known.get("license"),
        warnings=warnings,
        conversion=report_text(report) if "source" in report else "",
        picture=_picture(folder, spans, length),
        results=results,
    )


def _spans(config: SparseConfigMixin, causal: bool) -> tuple[Span, ...]:
    """A span for each distinct pattern of a stack, in the order of the layers."""
    spans = []
    for stack, count in config.stacks.items():
        layers: dict[str, list[int]] = {}
        for layer in range(count):
            layers.setdefault(config.layer_pattern(layer, stack=stack), []).append(layer)
        for text, numbers in layers.items():
            counted = config.layer_pattern(numbers[0], sees_past_only(stack, causal), stack)
            spans.append(Span(f"{stack} {_ranges(numbers)}".strip(), text, counted))
    return tuple(spans)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _auto_class(config: SparseConfigMixin, family: Family, head: str) -> str:
    """The Auto class that gives the checkpoint's own head."""
    known = {auto: ref.rpartition(".")[2] for auto, ref in auto_map(config).items()}
    fitting = [auto for auto, name in known.items() if name == family.architectures.get(head, head)]
    return next((auto for auto in TASKS if auto in fitting), fitting[0] if fitting else "AutoModel")


def _origin(folder: Path, report: dict, base: str | None) -> dict:
    """`base_model` and `license`, as far as known: what was asked for, then the old card, then the conversion."""
    found = (report.get("origin") or {}) | card_metadata(folder)
    if base is None:
        return found
    if Path(base).is_dir():
        return found | card_metadata(Path(base))
    if not is_id(base):
        raise ValueError(f"base is {base!r}; give a hub id (owner/name or name), or the folder of the dense checkpoint")
    return found | {"base_model": base}


def _picture(folder: Path, spans: tuple[Span, ...], length: int) -> str:
    """The sparsest pattern, drawn beside the card, or in it where matplotlib is missing."""
    span = min(spans, key=lambda s: _facts(s.counted, length).density)
    try:
        save_png(span.counted, length, folder / PICTURE)
    except ImportError:
        paper = io.StringIO()
        Console(file=paper, width=100).print(render(span.counted, length))
        return f"```text\n{paper.getvalue().rstrip()}\n```\n"
    return f"![The pattern of layers {span.layers}]({PICTURE})\n"
