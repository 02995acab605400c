"""What the studies share: options, a clock, results and a canvas."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback, logging

from sparse_hf.bench import environment, result_path, write_json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# steps that are not timed: kernels are compiled and memory is laid out
WARM_UP = 3
PRECISION = "float32 weights, bfloat16 autocast"
# of TrainingArguments
TRAINING = {
    "bf16": True,
    "use_cpu": DEVICE.type == "cpu",
    "optim": "adamw_torch",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """With the options that both have; `name` is that of the suite."""
    made = argparse.ArgumentParser(description=description)
    out = newest(name) or result_path(RESULTS, environment(DEVICE), name)
    made.add_argument("--out", type=Path, default=out, help="by default the newest of docs/results, or a new one there")
    made.add_argument("--plot", type=Path, default=out.with_suffix(".png"))
    made.add_argument("--plot-only", action="store_true", help="draw what --out holds")
    made.add_argument("--tiny", action="store_true", help="a tiny model and tiny texts, which show nothing")
    return made


def only_drawn(options: argparse.Namespace, plot: Callable[[dict, Path], object]) -> dict | None:
    """What a study has written, drawn, if nothing else was asked for. Else None, and Transformers is quiet from here on."""
    if options.plot_only:
        content = read(options.out)
        plot(content, options.plot)
        return content
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return None


def newest(name: str) -> Path | None:
    """The newest results of a study on whatever machine, to which rows are added."""
    return max(RESULTS.glob(f"*/*-{name}.json"), key=lambda path: path.name, default=None)


class Clock(TrainerCallback):
    """Seconds and peak memory of training steps.

    What Trainer does between them (evaluation, logs) is not counted.
    """

    def __init__(self):
        self.seconds, self.peak = [], 0

    def on_step_begin(self, args, state, control, **kwargs):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def step_s(self) -> float:
        """Median of a step."""
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)

    @property
    def peak_bytes(self) -> int | None:
        """Highest memory of a step, weights and optimizer included; None on a CPU."""
        return self.peak or None


def free() -> None:
    """Give back what the entry before held: Trainer and its model know each other."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


class Results:
    """Entries in a JSON file, written after each, with date and machine of its run.

    Entries of an earlier run are kept, on whatever machine it was, if it had these settings.

    Raises:
        ValueError: the file holds a run with other settings, of which entries would be lost.
    """

    def __init__(self, out: Path, settings: dict):
        self.out, self.settings, self.here = out, settings, environment(DEVICE)
        self.entries: dict[str, dict] = {}
        if out.exists():
            found, ours = read(out), json.loads(json.dumps(settings))
            different = [key for key, value in ours.items() if found["settings"].get(key) != value]
            if different:
                raise ValueError(f"{out} has other {', '.join(different)}; name another file with --out, or remove it")
            self.entries = found["entries"]

    def add(self, name: str, entry: dict, order: list[str]) -> None:
        self.entries[name] = {**entry, "environment": self.here}
        self.entries = {known: self.entries[known] for known in order if known in self.entries}
        write_json(self.content, self.out)

    @property
    def content(self) -> dict:
        return {"settings": self.settings, "entries": self.entries}


def read(out: Path) -> dict:
    content = json.loads(out.read_text(encoding="utf-8"))
    # files of one run alone said it once
    whole = content.pop("environment", None)
    for entry in content["entries"].values():
        entry.setdefault("environment", whole)
    return content


def hardware(content: dict) -> str:
    """All machines that entries are from."""
    return " and ".join(dict.fromkeys(entry["environment"]["hardware"] for entry in content["entries"].values()))


def measured(entry: dict) -> str:
    """Where and when an entry was measured."""
    return f"{entry['environment']['hardware']}, {entry['environment']['date']}"


def canvas(columns: int, title: str):
    """A figure of so many axes side by side; it needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "matplotlib>=3.9"') from error
    figure = Figure(figsize=(5.5 * columns, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def keep(found: dict, options: argparse.Namespace, plot: Callable[[dict, Path], object]) -> dict:
    """What an example found, written to --out and drawn to --plot where they are named."""
    if options.out:
        write_json(found, options.out)
    if options.plot:
        plot(found, options.plot)
    return found


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
