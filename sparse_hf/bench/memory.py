"""`sparse-hf bench memory`: what a training step on a long text holds and takes, with and without `long_text`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..units import duration, size, times
from .measure import (
    check_dtype,
    chosen_device,
    forget_compiled,
    measured,
    peak_bytes,
    print_row,
    synchronize,
    used_bytes,
)
from .plot import Line, Panel, draw, draw_beside
from .results import Result, Row, environment, result_path, write_json
from .text import Figures
from .training import (
    check_shape,
    dense_model,
    distance,
    gradients,
    in_pieces_of,
    make_batch,
    masked_step,
    planned_bytes,
    shape_config,
    sparse_model,
    training_step,
)

# what gradients are compared on, for a model of few layers: tokens, layers, and tokens of a piece
COMPARED_TOKENS, COMPARED_LAYERS, COMPARED_PIECE = 2048, 2, 256
# how many times as far from the dense model in float32 as the plain one in the same dtype, and how far in float32 itself
TIMES_AS_FAR, EXACT_DISTANCE = 1.5, 1e-4


# options of `long_text`, by what `--ways` calls them, and what readers call them; None leaves a model as it is
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "plain": ("as it is", None),
    "checkpointing": ("gradient checkpointing", {"logits": None, "feed_forward": None}),
    "long_text": ("long_text", {}),
    "offload": ("long_text, offload", {"offload": True}),
}
# those that do without this package
OTHERS = ("plain", "checkpointing")


@dataclass(frozen=True)
class LongSteps:
    """What `run_memory` runs.

    Attributes:
        cases: a shape and the tokens of its text, each.
        ways: names of `WAYS`.
        pattern: of every layer; by default a window with the first tokens, of a usual size for the family.
        dtype: "fp32", "bf16" or "fp16"; by default bf16 on a GPU and fp32 on a CPU.
        steps: that are timed, after one that is not; 0 times the first one, which compiles kernels.
        budget_s: seconds of a row after which no further step begins.
    """

    cases: tuple[tuple[str, int], ...]
    ways: tuple[str, ...] = ("plain", "checkpointing", "long_text")
    pattern: str | None = None
    dtype: str | None = None
    steps: int = 3
    budget_s: float = 20.0

    def __post_init__(self):
        if self.dtype is not None:
            check_dtype(self.dtype)
        for shape, length in self.cases:
            check_shape(shape)
            if length < 2:
                raise ValueError(f"a text of {shape} has {length} tokens; it needs two at least")
        unknown = sorted(set(self.ways) - set(WAYS))
        if unknown or not self.ways or not self.cases:
            raise ValueError(
                f"unknown ways {unknown}; the known ones are {', '.join(WAYS)}, and one case is needed at least"
            )
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must be 0 or more")


def run_memory(asked: LongSteps, device: str | None = None, out: str | Path | None = None) -> Result:
    """Measure peak memory and time of training steps, print a table, and write figures and a picture.

    A step is forward and backward of one row, without an optimizer. Memory is all that it holds: weights, gradients, activations.

    Gradients of two layers at 2,048 tokens are compared first, with those of Transformers' model in float32 that has the pattern as its
    mask: those of `long_text` may be no farther from them than 1.5 times those of the plain model. What does not fit has a row
    that says so.

    Args:
        asked: models, lengths and ways.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-memory.json`.

    Raises:
        ValueError: an unknown device.
    """
    target, console = chosen_device(device), Console(stderr=True)
    facts, dtype = environment(target), asked.dtype or ("bf16" if target.type == "cuda" else "fp32")
    rows: list[Row] = []
    result: Result = {"benchmark": "memory", "environment": facts, **asdict(asked), "dtype": dtype}
    result["shapes"] = {shape: shape_config(shape, n).to_diff_dict() for shape, n in asked.cases}
    result["compared"], result["rows"] = {}, rows
    compared: dict[str, Row] = result["compared"]
    path = None if out is None else result_path(out, facts, "memory")
    for shape, length in asked.cases:
        if shape not in compared:
            with console.status(f"{shape}: comparing"):
                compared[shape] = _compare(shape, dtype, target, asked.pattern)
            distance_text = f"gradients {compared[shape]['gradient_distance']:.1e} from the dense model's in float32"
            print_row({"name": shape, "n": COMPARED_TOKENS}, lambda row, told=distance_text: told, console)
        for way in asked.ways:
            row: Row = {"name": f"{shape}, {WAYS[way][0]}", "shape": shape, "way": way, "n": length}
            wrong = None if way in OTHERS else compared[shape].get("failed")
            with console.status(f"{row['name']}: {length:,} tokens"):
                work = partial(_figures, row, asked, dtype, target)
                rows.append({**row, "failed": wrong} if wrong else measured(row, work))
            print_row(rows[-1], _figures_text, console)
            _add_ratios(rows)
            if path is not None:
                # what is measured stays, whatever happens to the next row
                write_json(result, path)
    _table(result).print(Console())
    draw_beside(path, result, plot_memory, console)
    return result


def _compare(shape: str, dtype: str, device: torch.device, pattern: str | None) -> Row:
    """How far gradients are from those of the dense model in float32, given the pattern as its mask."""

    def found(in_pieces: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model = sparse_model(shape, COMPARED_TOKENS, dtype, device, pattern, COMPARED_LAYERS)
        if in_pieces:
            in_pieces_of(model, logits=COMPARED_PIECE, feed_forward=COMPARED_PIECE)
        return float(training_step(model, make_batch(model, COMPARED_TOKENS, device))), gradients(model)

    dense = dense_model(shape, COMPARED_TOKENS, "fp32", device, COMPARED_LAYERS, attn_implementation="sdpa")
    masked_step(dense, make_batch(dense, COMPARED_TOKENS, device), pattern)
    exact, plain, ours = gradients(dense), found(in_pieces=False), found(in_pieces=True)
    far, plain_far = distance(ours[1], exact), distance(plain[1], exact)
    row = {"loss": ours[0], "loss_plain": plain[0], "gradient_distance": far, "gradient_distance_plain": plain_far}
    limit = max(EXACT_DISTANCE, TIMES_AS_FAR * plain_far if dtype != "fp32" else 0)
    return row if far <= limit else {**row, "failed": f"wrong: gradients are {far:.2e} from those in float32"}


def _figures(row: Row, asked: LongSteps, dtype: str, device: torch.device) -> Row:
    forget_compiled(device)
    before = used_bytes(device)
    model = sparse_model(row["shape"], row["n"], dtype, device, asked.pattern)
    options = WAYS[row["way"]][1]
    handle = None if options is None else in_pieces_of(model, **options)
    batch = make_batch(model, row["n"], device)
    losses: list[float] = []

    def step() -> None:
        losses.append(float(training_step(model, batch)))

    taken: list[float] = []

    def steps() -> None:
        begin = time.perf_counter()
        for number in range(asked.steps + 1):
            if number > 1 and time.perf_counter() - begin > asked.budget_s:
                break
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            taken.append(time.perf_counter() - start)

    found: Row = {"peak_bytes": peak_bytes(steps, device, before)}
    found["first_step_s"], found["seconds"] = taken[0], statistics.median(taken[1:] or taken)
    found |= {"tokens_per_s": row["n"] / found["seconds"], "loss": losses[-1]}
    found["planned_bytes"] = planned_bytes(model, row["n"], row["way"], dtype)
    return found | ({"whole": handle.whole} if handle is not None and row["way"] not in OTHERS else {})


def _add_ratios(rows: Sequence[Row]) -> None:
    """Times the memory and the time of what Transformers does, in the fastest of its ways that ran."""
    done = [row for row in rows if not row.get("failed")]
    for row in done:
        beside = [
            r
            for r in done
            if (r["shape"], r["n"]) == (row["shape"], row["n"]) and r["way"] in ("plain", "checkpointing")
        ]
        if beside and row["way"] not in OTHERS:
            best = min(beside, key=lambda other: other["seconds"])
            row |= {"beside": best["way"], "times_the_time": row["seconds"] / best["seconds"]}
            if row["peak_bytes"] is not None:
                row["times_the_memory"] = row["peak_bytes"] / best["peak_bytes"]


def _figures_text(row: Row) -> str:
    return f"{duration(row['seconds'])} a step, {size(row['peak_bytes'])}"


def _title(result: Result) -> str:
    return f"training steps, forward and backward: {result['dtype']}, {result['environment']['hardware']}"


def _table(result: Result) -> Figures:
    table = Figures(_title(result), ("", "tokens", "a step", "tokens/s", "peak", "planned", "time", "memory"))
    for row in result["rows"]:
        if row.get("failed"):
            table.fail(row["shape"], f"{WAYS[row['way']][0]}, {row['n']:,}", row["failed"])
            continue
        figures = (
            duration(row["seconds"]),
            f"{row['tokens_per_s']:,.0f}",
            size(row["peak_bytes"]),
            size(row["planned_bytes"]),
        )
        ratios = (times(row.get("times_the_time")), times(row.get("times_the_memory")))
        table.add(row["shape"], WAYS[row["way"]][0], f"{row['n']:,}", *figures, *ratios)
    table.notes.append("planned: by sparse-hf plan-memory; time, memory: by those of the faster of the other ways")
    return table


def plot_memory(result: Result, path: Path) -> None:
    """Draw peak memory and time of a step against the tokens, a line for each shape and way."""
    done = [row for row in result["rows"] if not row.get("failed") and row["peak_bytes"] is not None]
    if not done:
        return
    shapes, ways = (list(dict.fromkeys(row[key] for row in done)) for key in ("shape", "way"))
    styles = dict(zip(ways, ("-", "--", ":", "-."), strict=False))

    def lines(key: str, scale: float) -> list[Line]:
        found = []
        for name in dict.fromkeys(row["name"] for row in done):
            rows = sorted((row for row in done if row["name"] == name), key=lambda row: row["n"])
            color = f"C{shapes.index(rows[0]['shape'])}"
            found.append(Line(name, [(row["n"], row[key] * scale) for row in rows], color, styles[rows[0]["way"]]))
        return found

    panels = [Panel("peak, GiB", lines("peak_bytes", 2**-30)), Panel("a step, s", lines("seconds", 1.0))]
    draw(panels, f"{_title(result)}, torch {result['environment']['versions']['torch']}", path)
