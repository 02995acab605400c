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
    ("", "h200/2026-11-27-models", "bert", 65536, "step_s"),
    ("Longformer, Transformers' -> ours", "h200/2026-11-27-models-longformer", "longformer", 16384, "step_s"),
    ("Whisper's encoder, 300 s of sound, dense -> a window of 10 s", "h200/2026-11-30-models-whisper", "whisper", 15000, "step_s"),
    ("a decoder of 1B, dense -> a window of 1,024, 4 sinks", "h200/2026-11-25-models-decoder-1b", "llama_1b", 65536, "step_s"),
    ("a token of such a decoder, dense, static cache -> window of 4,096, streaming cache", "h200/2026-11-30-generate-static",
     None, 32768, "token_s"),
    ("", "h200/2026-11-30-generate-static", None, 262144, "token_s"),
)  # fmt: skip
ON_A_CPU = (
    f"2 CPU cores, forward, 2 layers: BERT, dense -> {WINDOW}",
    "cpu-2-cores/2026-11-25-models",
    "bert",
    16384,
    "forward_s",
)
MEMORY, SEQUENCE, MILLION = "h200/2026-11-30-memory", "h200/2026-11-30-sequence", 1 << 20
# of caches, those that are compared: the dense model's best one, and ours that does not grow; a file of models names none
CASES = {None, "dense-static", "streaming"}
# of answers that stand in the text: the file, what the row calls it, what the file calls it
TUNED, RECALLED = "h200/2026-11-30-evaluate-tuned-smollm2-8k", (
    ("SmolLM2-135M asked for what stands in 8,192 tokens", "no layer dense"),
    ("the same, a quarter of the layers dense, chosen by `sparse-hf tune`", "tuned"),
)  # fmt: skip
STREAMED, INDEXED = "h200/2026-11-30-study-streaming", "h200/2026-11-30-study-indexer-qwen"


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
    for label, name, model, n, timed in (*STEPS, ON_A_CPU):
        if timed == "forward_s":
            lines += long_texts()
        rows = [
            row
            for row in read(name)["rows"]
            if row["n"] == n and row.get("model") == model and row.get("case") in CASES and row.get("rows", 1) == 1
        ]
        (ours,), (theirs,) = ([row for row in rows if (row["kind"] == "ours") is is_ours] for is_ours in (True, False))
        spent = "cache_bytes" if timed == "token_s" else "peak_bytes"
        lines.append(beside(label, n, [(row[timed], row[spent]) for row in (theirs, ours)], name))
    return "\n".join(lines)


def beside(label: str, n: int, measured: list[tuple[float, int]], name: str) -> str:
    """A row of the table of speed: times and bytes, before and after."""
    (before, held), (after, holds) = measured
    faster = before / after
    times = f"{faster:.{0 if faster >= 10 else 1}f} x"
    cells = (label, f"{n:,}", seconds(before), seconds(after), times, f"{size(held)} -> {size(holds)}", link(name))
    return f"| {' | '.join(cells)} |"


def long_texts() -> list[str]:
    """Training steps of the decoder of 1B: their memory, and a text that two GPUs share."""
    pieces = {row["way"]: row for row in read(MEMORY)["rows"] if row["shape"] == "1b" and row["n"] == 65536}
    shared = {row["gpus"]: row for row in read(SEQUENCE)["rows"] if row["name"] == "equal text"}
    told = (
        (
            "such a decoder of 128,256 words, sparse, gradient checkpointing -> `long_text`",
            65536,
            [pieces["checkpointing"], pieces["long_text"]],
            MEMORY,
        ),
        ("the same, `long_text` on one GPU -> on two that share the text", MILLION, [shared[1], shared[2]], SEQUENCE),
    )
    return [
        beside(label, n, [(row["seconds"], row["peak_bytes"]) for row in rows], name) for label, n, rows, name in told
    ]


def quality() -> str:
    demo = "cpu-2-cores/2026-11-24-demo"
    novel = [f"{read(demo)[f'decoder {kind}']['quality']:.2f}" for kind in ("dense", "sparse")]
    dense, sparse = (read(demo)[f"encoder {kind}"]["embedding"] for kind in ("dense", "sparse"))
    cosine = sum(a * b for a, b in zip(dense, sparse, strict=True))
    lines = [
        "| | pattern | dense -> sparse | measured |",
        "|---|---|---|---|",
        f"| SmolLM2-135M, 8,192 tokens of a novel | {SINKS} | perplexity {' -> '.join(novel)} | {link(demo)} |",
        rf"| all-MiniLM-L6-v2, grown to 4,096 tokens | `window(128, 128) \| first(1)` | cosine of embeddings {cosine:.3f} | {link(demo)} |",
    ]
    for label, candidate in RECALLED:
        answers = [read(TUNED)["probes"]["recall"]["candidates"][one] for one in ("dense", candidate)]
        lost = " -> ".join(f"{one['loss']:.2f}" for one in answers)
        said = " -> ".join(f"{one['recalled']:.0%}" for one in answers)
        lines.append(f"| {label} | {SINKS} | loss of the answer {lost}, said word for word {said} | {link(TUNED)} |")
    # the last words of a book
    ways = read(STREAMED)["entries"]
    last = [list(ways[way]["by_position"].values())[-1] for way in ("dense", "sinks, in the cache")]
    lines.append(
        '| SmolLM2-135M, made for 8,192 tokens, at the end of 65,536, `positions="cache"` | `window(1019, 0) \\| first(4)` | '
        f"perplexity {last[0]:,.0f} -> {last[1]:.2f} | {link(STREAMED)} |"
    )
    chosen = read(INDEXED)["entries"]
    numbers = [
        " -> ".join(text.format(chosen[one][key]) for one in ("dense", "window", "indexer, alone"))
        for key, text in (("perplexity", "{:.2f}"), ("recalled", "{:.0%}"))
    ]
    lines.append(
        "| Qwen2.5-Coder-0.5B, facts in 8,192 and 32,768 tokens: dense -> window and sinks -> those and an indexer of 500 steps | "
        r"`window(127, 0) \| first(4) \| topk(2048, 'indexer')` | "
        f"perplexity {numbers[0]}, said word for word {numbers[1]} | {link(INDEXED)} |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{speed()}\n\n{quality()}")
