"""`sparse-hf plan-memory`: what a training step will hold, before it is run; no weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..units import size
from .arguments import read_folder, words
from .paragraphs import print_lines

WAYS = "plain,checkpointing,long_text"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# how several processes share a step: what readers call it, and `split` and `fsdp` of `plan_memory`
SHARES = {
    "each a text": (False, False), "each a text, FSDP2": (False, True), "one text": (True, False), "one text, FSDP2": (True, True),
}  # fmt: skip
COLUMNS = ("peak", "weights", "gradients", "optimizer", "layers", "logits")


def plan_memory(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint, dense or sparse: a folder, or a hub id; its configuration alone is read."),
    ],
    length: Annotated[int, typer.Option(help="Tokens of a text.")],
    gpus: Annotated[int, typer.Option(help="GPUs, a process each.")] = 1,
    rows: Annotated[int, typer.Option(help="Texts at a time: of a process, or of all that share them.")] = 1,
    ways: Annotated[str, typer.Option(help="Any of plain, checkpointing, long_text, offload, with commas.")] = WAYS,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd or none.")] = "adamw",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of weights and activations.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a training step will hold at most, on one GPU or on each of several.

    With several, each takes a text of its own, or all share each text (`split_sequence`), with weights
    whole on each or shared too (FSDP2).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; the known ones are {', '.join(DTYPES)}")
    found = list(_plans(model, words(ways), dtype, length=length, gpus=gpus, rows=rows, optimizer=optimizer))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        told = f"{Path(model).name}: a training step, {rows} x {length:,} tokens, {dtype}, optimizer {optimizer}"
        print_lines([told, *_lines(found, gpus)])


def _plans(model: str, ways: list[str], dtype: str, **given: Any) -> Iterator[dict[str, Any]]:
    import torch
    from transformers import AutoConfig

    from ..train import plan_memory

    if not ways:
        raise ValueError(f"--ways is empty; give some of {WAYS},offload")
    config = AutoConfig.from_pretrained(read_folder(model, weights=False))
    for name, (split, fsdp) in SHARES.items() if given["gpus"] > 1 else [("one GPU", (False, False))]:
        for way in ways:
            plan = plan_memory(config, way=way, split=split, fsdp=fsdp, dtype=getattr(torch, DTYPES[dtype]), **given)
            yield {"shares": name, "way": way, **plan.as_json()}


def _lines(found: list[dict[str, Any]], gpus: int) -> Iterator[str]:
    yield f"{'':14}" + "".join(f"{column:>11}" for column in COLUMNS)
    for share in dict.fromkeys(plan["shares"] for plan in found):
        if gpus > 1:
            yield f"{share}, on each of {gpus} GPUs:"
        for plan in (plan for plan in found if plan["shares"] == share):
            parts = plan["parts"]
            layers = sum(parts.get(name, 0) for name in ("inputs of layers", "a layer in work"))
            cells = (plan["peak"], *(parts.get(name) for name in COLUMNS[1:4]), layers or None, parts.get("logits"))
            yield f"{plan['way']:14}" + "".join(f"{size(cell):>11}" for cell in cells)
    yield "The parts are those of the fullest moment; what is empty is not held then."
