"""Write model_cards/ for the demo's two conversions, from their configurations and measured results.

python examples/demo.py && python examples/make_cards.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from huggingface_hub import ModelCard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_hf.convert.card import Card, Span, card_text  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "demo.json"

CARDS = [
    {
        "name": "SmolLM2-135M-Instruct-window-512-sinks-4",
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "family": "llama",
        "auto": "AutoModelForCausalLM",
        "length": 8192,
        "layers": "0-29",
        "pattern": "window(511, 0) | first(4)",
        "counted": "(window(511, 0) | first(4)) & window(None, 0)",
        "which": "decoder",
        "note": "Weights dequantised from 4 bits (GGUF Q4_1); not fine-tuned after conversion.",
    },
    {
        "name": "all-MiniLM-L6-v2-4096-window-128-global-1",
        "base": "sentence-transformers/all-MiniLM-L6-v2",
        "family": "bert",
        "auto": "AutoModel",
        "length": 4096,
        "layers": "0-5",
        "pattern": "window(128, 128) | first(1)",
        "counted": "window(128, 128) | first(1)",
        "which": "encoder",
        "note": "Positions grown from 512 to 4,096 by tiled copy; not fine-tuned after conversion, which long texts need.",
    },
]


def card(spec: dict, results: dict) -> str:
    span = Span(spec["layers"], spec["pattern"], spec["counted"])
    same = ("name", "base", "family", "auto", "length", "note")
    return card_text(
        Card(**{key: spec[key] for key in same}, license="apache-2.0", spans=(span,), results=measured(spec, results))
    )


def measured(spec: dict, results: dict) -> dict:
    """The demo's figures as cards take them."""
    sparse, dense = (results[f"{spec['which']} {kind}"] for kind in ("sparse", "dense"))
    figures = {
        "note": f"`make demo`, {spec['length']:,} tokens of Moby Dick, on the machine that wrote `docs/results/demo.json`; "
        "the weights are the same.",
        "seconds": {"sparse": sparse["seconds"], "dense": dense["seconds"]},
        "tensors with two length dimensions": {"sparse": sparse["quadratic"], "dense": dense["quadratic"]},
    }
    if "quality" in sparse:
        return figures | {"perplexity": {"sparse": sparse["quality"], "dense": dense["quality"]}}
    alike = sum(a * b for a, b in zip(sparse["embedding"], dense["embedding"], strict=True))
    return figures | {"cosine of the document's embedding to the dense one": {"sparse": alike, "dense": 1}}


def main() -> None:
    if not RESULTS.exists():
        sys.exit(f"{RESULTS} is missing; run `make demo` and copy its results.json there")
    results = json.loads(RESULTS.read_text())
    for spec in CARDS:
        content = card(spec, results)
        ModelCard(content)  # raises if the metadata is not readable
        path = ROOT / "model_cards" / f"{spec['name']}.md"
        path.with_suffix(".partial").write_text(content, encoding="utf-8")
        os.replace(path.with_suffix(".partial"), path)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
