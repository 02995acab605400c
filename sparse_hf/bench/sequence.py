"""`sparse-hf bench sequence`: training steps on texts that several processes share, on more and more of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..pattern import Pattern
from ..units import duration, size, times
from .measure import check_dtype, chosen_device, print_row
from .plot import Line, Panel, draw, draw_beside
from .results import Result, Row, environment, result_path, write_json
from .text import Figures
from .training import DECODER_PATTERN, check_shape

# how often the launcher looks, and how long processes have to end once one of them has failed
POLL_INTERVAL_S, ENDING_S = 0.2, 5.0
# what is compared before anything is timed: shape, dtype, pattern, and whether FSDP2 stands beside
COMPARED = (
    ("tiny", "bf16", "window(127, 0) | first(4)", False),
    ("tiny-bert", "bf16", "window(64, 64) | first(1)", False),
    ("tiny", "fp32", "window(127, 0) | first(4)", False),
    ("tiny", "fp32", "window(127, 0) | first(4)", True),
    ("tiny-bert", "fp32", "window(64, 64) | first(1)", False),
)
COMPARED_TOKENS = 4096
# kernels and ways round of torch's ring, of which the fastest stands for it
RINGS = (("flash", "allgather"), ("flash", "alltoall"), ("cudnn", "allgather"), ("cudnn", "alltoall"))
SHARED, EACH = "equal text", "equal tokens a process"


@dataclass(frozen=True)
class SharedTexts:
    """What `run_sequence` runs.

    Attributes:
        processes: numbers of processes (a GPU each) that share a text, ascending.
        tokens: of the text that every number of them shares.
        tokens_each: tokens of a process where the text grows with them; None leaves that out.
        shape: of the model.
        large_shape: of one that the most processes train on `tokens` tokens, with FSDP2 beside; None leaves that out.
        ring: lengths at which torch's ring of dense attention runs on the most processes.
        pattern: of every layer.
        dtype: "fp32", "bf16" or "fp16"; by default bf16 on GPUs and fp32 on CPUs.
        limit_s, budget_s: seconds of a case, and of all; what is left then is not run.
        offload: keep the inputs of layers in the host's memory, for texts that do not fit otherwise.
    """

    processes: tuple[int, ...] = (1, 2, 4)
    tokens: int = 1 << 20
    tokens_each: int | None = 1 << 20
    shape: str = "1b"
    large_shape: str | None = None
    ring: tuple[int, ...] = ()
    pattern: str = DECODER_PATTERN
    dtype: str | None = None
    limit_s: float = 120.0
    budget_s: float = 600.0
    offload: bool = False

    def __post_init__(self):
        if self.dtype is not None:
            check_dtype(self.dtype)
        for shape in (self.shape, self.large_shape):
            if shape is not None:
                check_shape(shape)
        if not self.processes or list(self.processes) != sorted(set(self.processes)) or self.processes[0] < 1:
            raise ValueError(f"processes are {list(self.processes)}; give ascending numbers from 1, like 1,2,4")
        least = min(n for n in (self.tokens, self.tokens_each, *self.ring) if n is not None)
        if least < 2 * self.processes[-1]:
            raise ValueError(f"a text has {least} tokens for {self.processes[-1]} processes; each needs two at least")
        Pattern.parse(self.pattern)


def run_sequence(asked: SharedTexts, device: str | None = None, out: str | Path | None = None) -> Result:
    """Time training steps whose texts are split over processes, print a table, and write figures and a picture.

    A step is forward, backward and gradients that are averaged, with `long_text`. Before it, gradients of small models on all
    processes are compared with the dense model's, which has the pattern as its mask. Then come: one text on more and more
    processes; a text that grows with them; two texts at a time on the most processes, with FSDP2; a larger model there; and the
    dense model in torch's ring of attention.

    Every case has its time limit. One that fails, hangs or is out of memory has a row that says so, and the others run.

    Args:
        asked: processes, lengths, models and limits.
        device: "cpu" (processes that talk through gloo) or "cuda"; by default GPUs if there are any.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-sequence.json`.

    Raises:
        ValueError: more processes than GPUs, or an unknown device, shape or dtype.
    """
    target = chosen_device(device)
    most = asked.processes[-1]
    if target.type == "cuda" and most > torch.cuda.device_count():
        raise ValueError(
            f"{most} processes take {most} GPUs, and there are {torch.cuda.device_count()}; give fewer (--processes 1,2), or "
            "--device cpu"
        )
    facts, console = environment(target), Console(stderr=True)
    dtype = asked.dtype or ("bf16" if target.type == "cuda" else "fp32")
    rows: list[Row] = []
    result: Result = {"benchmark": "sequence", "environment": facts, **asdict(asked), "dtype": dtype, "rows": rows}
    path = None if out is None else result_path(out, facts, "sequence")
    common = {"device": target.type, "data": 1, "fsdp": False, "steps": 1}
    common |= {"pattern": asked.pattern, "offload": asked.offload}

    def done(row: Row) -> None:
        rows.append(row)
        print_row(row, _figures_text, console)
        _add_ratios(rows)
        if path is not None:
            # what is measured stays, whatever happens to the next row
            write_json(result, path)

    launcher = _Launcher(asked, done)
    cases = [*_steps(asked), *_larger(asked), *_ring_at_first(asked)]
    launcher.run([{**common, "dtype": dtype, "shape": asked.shape, **case} for case in cases])
    # of which kernel is decided by what was measured
    for case in _ring_later(asked, rows):
        launcher.run([{**common, "dtype": dtype, "shape": asked.shape, **case}])
    _table(result).print(Console())
    draw_beside(path, result, plot_sequence, console)
    return result


def _steps(asked: SharedTexts) -> Iterator[Row]:
    """Cases of each number of processes, the most of them first."""
    most = asked.processes[-1]
    for count in sorted(asked.processes, key=lambda count: (count != most, count)):
        if count > 1:
            for shape, dtype, pattern, fsdp in COMPARED:
                name = f"gradients, {shape}, {dtype}" + (", FSDP2" if fsdp else "")
                compared = {"work": "exact", "name": name, "gpus": count, "n": COMPARED_TOKENS}
                yield {**compared, "shape": shape, "dtype": dtype, "pattern": pattern, "fsdp": fsdp}
        yield {"work": "step", "name": SHARED, "gpus": count, "n": asked.tokens}
        if asked.tokens_each is not None and (count > 1 or asked.tokens_each != asked.tokens):
            yield {"work": "step", "name": EACH, "gpus": count, "n": asked.tokens_each * count}


def _larger(asked: SharedTexts) -> Iterator[Row]:
    """Two texts at a time, and a larger model."""
    most = asked.processes[-1]
    case = {"work": "step", "gpus": most, "n": asked.tokens, "fsdp": True}
    if most >= 4 and most % 2 == 0:
        yield {**case, "name": f"mesh of 2 x {most // 2}", "data": 2}
    if asked.large_shape is not None:
        yield {**case, "name": f"{asked.large_shape}, FSDP2", "shape": asked.large_shape}


def _ring_at_first(asked: SharedTexts) -> Iterator[Row]:
    """The shortest of the lengths with each kernel and each way round; the fastest stands for the ring."""
    for n in asked.ring[:1]:
        for kernel, rotation in RINGS:
            yield _ring_case(asked, n, kernel, rotation)
    for n in asked.ring:
        yield {"work": "step", "name": "beside the ring", "gpus": asked.processes[-1], "n": n}


def _ring_later(asked: SharedTexts, rows: Sequence[Row]) -> Iterator[Row]:
    """Longer texts in the fastest ring, as long as its time is expected to do."""
    for n in asked.ring[1:]:
        ran = [row for row in rows if row["work"] == "ring" and not row.get("failed")]
        if not ran:
            return
        last = min(ran, key=lambda row: (-row["n"], row["seconds"]))
        case = _ring_case(asked, n, last["kernel"], last["rotation"])
        expected = last["seconds"] * (n / last["n"]) ** 2
        yield case | ({"failed": f"not run: it would take some {expected:,.0f} s"} if expected > asked.limit_s else {})


def _ring_case(asked: SharedTexts, n: int, kernel: str, rotation: str) -> Row:
    name = f"dense, torch's ring ({kernel}, {rotation})"
    return {
        "work": "ring", "name": name, "gpus": asked.processes[-1], "n": n, "kernel": kernel, "rotation": rotation,
    }  # fmt: skip


@dataclass
class _Launcher:
    """Starts processes for cases, as many at a time as can go on in the same ones."""

    asked: SharedTexts
    done: Callable[[Row], None]

    def __post_init__(self):
        self.end = time.monotonic() + self.asked.budget_s

    def run(self, cases: Sequence[Row]) -> None:
        for count, group in groupby(cases, key=lambda case: case["gpus"]):
            left = list(group)
            while left:
                if left[0].get("failed"):
                    self.done(left.pop(0))
                elif time.monotonic() > self.end:
                    self.done({**left.pop(0), "failed": "not run: the time for all cases is spent"})
                else:
                    left = self._launch(count, left)

    def _launch(self, count: int, cases: list[Row]) -> list[Row]:
        """Run cases until all are done, or one has failed; those that are left."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command += ["-m", "sparse_hf.bench.sequence_worker", name]
            # processes of several GPUs on one host talk by NVLink; its multicast is not theirs everywhere
            surroundings = {"OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0", **os.environ}
            with (folder / "said.txt").open("w", encoding="utf-8") as said:
                process = subprocess.Popen(
                    command, env=surroundings, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                )
            try:
                return self._watch(process, folder, cases)
            finally:
                _end(process)

    def _watch(self, process: subprocess.Popen, folder: Path, cases: list[Row]) -> list[Row]:
        found, since = 0, time.monotonic()
        while True:
            has_ended = process.poll() is not None
            rows = _read_rows(folder / "rows.jsonl")
            for row in rows[found:]:
                self.done({**cases[found], **row})
                found, since = found + 1, time.monotonic()
            if found == len(cases):
                return []
            failed = has_ended or any(folder.glob("error-*.txt"))
            if failed:
                if not has_ended:
                    # the others may have more to say
                    time.sleep(ENDING_S)
                self.done({**cases[found], "failed": _reason(folder)})
                return cases[found + 1 :]
            waited = time.monotonic() - since
            if waited > self.asked.limit_s or time.monotonic() > self.end + self.asked.limit_s:
                self.done({**cases[found], "failed": f"stopped after {waited:,.0f} s"})
                return cases[found + 1 :]
            time.sleep(POLL_INTERVAL_S)


def _read_rows(path: Path) -> list[Row]:
    """Rows whose lines are whole."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _reason(folder: Path) -> str:
    """What the processes said: of one that met with an error, if there is one."""
    errors = sorted(path.read_text(encoding="utf-8") for path in folder.glob("error-*.txt"))
    if "out of memory" in errors:
        return "out of memory"
    said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # who waited for another that failed says so at length
    lines = min(errors, key=len).splitlines() if errors else said[-1:]
    return lines[0] if lines else "ended without a word"


def _end(process: subprocess.Popen) -> None:
    """End a launcher and the processes that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _add_ratios(rows: Sequence[Row]) -> None:
    """How near to as many times one process more of them are, and how many times faster than the ring."""
    timed = [row for row in rows if not row.get("failed") and "seconds" in row]
    one = next((row for row in timed if row["name"] == SHARED and row["gpus"] == 1), None)
    for row in timed:
        if one is not None and row["name"] in (SHARED, EACH):
            row["of_linear"] = row["tokens_per_s"] / (row["gpus"] * one["tokens_per_s"])
        if row["work"] == "step" and row["shape"] == (one or row)["shape"] and row["data"] == 1:
            rings = [
                r["seconds"] for r in timed if r["work"] == "ring" and r["n"] == row["n"] and r["gpus"] == row["gpus"]
            ]
            if rings:
                row["times_faster_than_ring"] = min(rings) / row["seconds"]


def _figures_text(row: Row) -> str:
    where = f"{row['gpus']} process(es): "
    if row["work"] == "exact":
        return where + f"gradients {row['gradient_distance']:.1e} from the dense model's in float32"
    held = f"{duration(row['seconds'])}, {row['tokens_per_s']:,.0f} tokens/s, {size(row['peak_bytes'])} each"
    return where + held + (f", {size(row['bytes_a_layer'])} sent a layer" if row.get("bytes_a_layer") else "")


def _title(result: Result) -> str:
    facts = result["environment"]
    return f"training steps under {result['pattern']}: {result['shape']}, {result['dtype']}, {facts['hardware']}"


def _table(result: Result) -> Figures:
    columns = ("", "tokens", "a step", "tokens/s", "peak", "sent a layer", "of linear", "faster", "gradients")
    table = Figures(_title(result), columns)
    for row in result["rows"]:
        group = f"{row['gpus']} process(es)"
        if row.get("failed"):
            table.fail(group, f"{row['name']}, {row['n']:,}", row["failed"])
        elif row["work"] == "exact":
            table.add(group, row["name"], f"{row['n']:,}", *[""] * 6, f"{row['gradient_distance']:.1e}")
        else:
            figures = (duration(row["seconds"]), f"{row['tokens_per_s']:,.0f}", size(row["peak_bytes"]))
            linear = f"{row['of_linear']:.2f}" if "of_linear" in row else ""
            faster = times(row.get("times_faster_than_ring"))
            table.add(
                group, row["name"], f"{row['n']:,}", *figures, size(row.get("bytes_a_layer")), linear, faster, ""
            )  # fmt: skip
    table.notes.append("of linear: tokens/s by those of one process times their number; faster: than torch's ring")
    table.notes.append("gradients: relative distance from the dense model's in float32, with the pattern as its mask")
    return table


def plot_sequence(result: Result, path: Path) -> None:
    """Draw tokens a second and memory of a process against their number."""
    timed = [row for row in result["rows"] if not row.get("failed") and row["name"] in (SHARED, EACH)]
    one = [row for row in timed if row["gpus"] == 1][:1]

    def lines(key: str, scale: float) -> list[Line]:
        found = []
        for number, name in enumerate((SHARED, EACH)):
            rows = [row for row in timed if row["name"] == name]
            rows = rows if any(row["gpus"] == 1 for row in rows) else [*one, *rows]
            points = sorted((row["gpus"], row[key] * scale) for row in rows)
            if points:
                found.append(Line(name, points, f"C{number}"))
        return found

    rate = lines("tokens_per_s", 1.0)
    if one:
        linear = [(count, count * one[0]["tokens_per_s"]) for count in result["processes"]]
        rate.append(Line("linear", linear, "gray", ":"))
    panels = [
        Panel("tokens/s", rate, "processes"),
        Panel("peak of a process, GiB", lines("peak_bytes", 2**-30), "processes"),
    ]
    versions: dict[str, Any] = result["environment"]["versions"]
    draw(panels, f"{_title(result)}, torch {versions['torch']}", path)
