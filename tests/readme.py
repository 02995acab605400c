"""The tables of figures in README.md, made from the files of results that they name: `python -m tests.readme` prints them."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"
WINDOW, SINKS = r"`window(256, 256) \| first(1)`", r"`window(511, 0) \| first(4)`"
RECALLING = r"`window(127, 0) \| first(4)`"
# what the row calls it, file, the file's name of the model, tokens, the timed key
STEPS = (
    (f"BERT, dense -> {WINDOW}", "h200/2026-11-27-models", "bert", 4096, "step_s"),
    ("", "h200/2026-11-27-models", "bert", 16384, "step_s"),
    ("", "h200/2026-11-27-models", "bert", 65536, "step_s"),
    ("Longformer, Transformers' -> ours", "h200/2026-11-27-models-longformer", "longformer", 16384, "step_s"),
    ("BigBird, Transformers' -> ours", "h200/2026-11-27-models", "big_bird", 16384, "step_s"),
    ("a decoder of 1B, dense -> a window of 1,024, 4 sinks", "h200/2026-11-25-models-decoder-1b", "llama_1b", 65536, "step_s"),
    ("a token of such a decoder, dense, static cache -> window of 4,096, streaming cache", "h200/2026-11-30-generate",
     None, 262144, "token_s"),
    (f"2 CPU cores, forward, 2 layers: BERT, dense -> {WINDOW}", "cpu-2-cores/2026-11-25-models", "bert", 16384, "forward_s"),
)  # fmt: skip
# of caches, those that are compared: the dense model's best one, and ours that does not grow; a file of models names none
CASES = {None, "dense-static", "streaming"}
# what the row calls it, the checkpoint in the file, its measure
CONVERTED = (("rxnfp (BERT), a classifier of 512 tokens", "rxnfp-classifier"),)
# of answers that stand in the text: the file, what the row calls it, what the file calls it
TUNED = "cpu-2-cores/2026-11-30-evaluate-tuned-smollm2"
RECALLED = (
    ("cpu-2-cores/2026-11-30-evaluate-smollm2", "SmolLM2-135M asked for what stands in 512 tokens", "window and sinks"),
    (TUNED, "other such questions", "no layer dense"),
    (TUNED, "the same, a fifth of the layers dense, chosen by `sparse-hf tune`", "layers by answers, 1/5"),
)


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def link(name: str) -> str:
    return f"[{name.rpartition('/')[2][11:]}](docs/results/{name}.json)"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:,.1f} ms" if value < 0.01 else f"{value * 1000:,.0f} ms"


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def speed() -> str:
    lines = ["| | tokens | before | sparse_hf | | peak memory | measured |", "|---|---|---|---|---|---|---|"]
    for label, name, model, n, timed in STEPS:
        rows = [
            row
            for row in read(name)["rows"]
            if row["n"] == n and row.get("model") == model and row.get("case") in CASES and row.get("rows", 1) == 1
        ]
        (ours,), (theirs,) = ([row for row in rows if (row["kind"] == "ours") is is_ours] for is_ours in (True, False))
        faster = theirs[timed] / ours[timed]
        spent = "cache_bytes" if timed == "token_s" else "peak_bytes"
        cells = (label, f"{n:,}", seconds(theirs[timed]), seconds(ours[timed]), f"{faster:.{0 if faster >= 10 else 1}f} x",
                 f"{size(theirs[spent])} -> {size(ours[spent])}", link(name))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quality() -> str:
    demo, healing, real = (
        "cpu-2-cores/2026-11-24-demo",
        "h200/2026-11-25-study-healing",
        "cpu-2-cores/2026-11-25-real-weights",
    )
    books = {name: f"{row['perplexity']:.2f}" for name, row in read(healing)["entries"].items()}
    novel = [f"{read(demo)[f'decoder {kind}']['quality']:.2f}" for kind in ("dense", "sparse")]
    dense, sparse = (read(demo)[f"encoder {kind}"]["embedding"] for kind in ("dense", "sparse"))
    cosine = sum(a * b for a, b in zip(dense, sparse, strict=True))
    lines = [
        "| | pattern | dense -> sparse | measured |",
        "|---|---|---|---|",
        f"| SmolLM2-135M, 8,192 tokens of a novel | {SINKS} | perplexity {' -> '.join(novel)} | {link(demo)} |",
        f"| the same, four other books, both trained for 200 steps | {SINKS} | perplexity {books['dense, trained']} -> "
        f"{books['sparse, trained']} | {link(healing)} |",
        rf"| all-MiniLM-L6-v2, grown to 4,096 tokens | `window(128, 128) \| first(1)` | cosine of embeddings {cosine:.3f} | {link(demo)} |",
    ]
    for name, label, candidate in RECALLED:
        answers = [read(name)["probes"]["recall"]["candidates"][one] for one in ("dense", candidate)]
        lost = " -> ".join(f"{one['loss']:.2f}" for one in answers)
        said = " -> ".join(f"{one['recalled']:.0%}" for one in answers)
        lines.append(f"| {label} | {RECALLING} | loss of the answer {lost}, said word for word {said} | {link(name)} |")
    for label, checkpoint in CONVERTED:
        measure = next(m for m in read(real)["checkpoints"][checkpoint]["measures"] if m["name"] == "narrow")
        pattern = measure["pattern"].replace("|", r"\|")
        same = f"the dense answer at {measure['same']:.1%}"
        if "dense_perplexity" in measure:
            same = f"perplexity {measure['dense_perplexity']:.2f} -> {measure['sparse_perplexity']:.2f}, {same}"
        lines.append(f"| {label} | `{pattern}` | {same} | {link(real)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{speed()}\n\n{quality()}")
