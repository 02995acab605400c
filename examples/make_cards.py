"""Write model_cards/ for the demo's two conversions, from their configurations and measured results.

python examples/demo.py && python examples/make_cards.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_hf.show import describe  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "demo.json"

BODY = """
# {name}

[{base}](https://huggingface.co/{base}) with sparse attention by [sparse_hf](../README.md): `{pattern}`. {note}

```python
import sparse_hf
from transformers import {auto}

model = {auto}.from_pretrained("path/to/{name}")
```

## The pattern at {length:,} tokens

| | sparse | dense |
|---|---|---|
| pairs | {facts.pairs:,} ({facts.density:.2%}) | {dense_pairs:,} |
| keys per query, mean | {mean:,.0f} | {length:,} |
| layers until every token hears {whom} | {facts.layers_to_reach} | 1 |

## Measured

`make demo`, {length:,} tokens of Moby Dick, on the machine that wrote `docs/results/demo.json`; the weights are the same.

| | sparse | dense |
|---|---|---|
| seconds | {sparse[seconds]:.1f} | {dense[seconds]:.1f} |
| tensors with two length dimensions | {sparse[quadratic]} | {dense[quadratic]} |
{quality}
"""

CARDS = [
    {
        "name": "SmolLM2-135M-Instruct-window-512-sinks-4",
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "pattern": "window(511, 0) | first(4)",
        "auto": "AutoModelForCausalLM",
        "tag": "text-generation",
        "which": "decoder",
        "length": 8192,
        "note": "Weights dequantised from 4 bits (GGUF Q4_1); not fine-tuned after conversion.",
        "shape": {"num_heads": 9, "head_dim": 64},
    },
    {
        "name": "all-MiniLM-L6-v2-4096-window-128-global-1",
        "base": "sentence-transformers/all-MiniLM-L6-v2",
        "pattern": "window(128, 128) | first(1)",
        "auto": "AutoModel",
        "tag": "feature-extraction",
        "which": "encoder",
        "length": 4096,
        "note": "Positions grown from 512 to 4,096 by tiled copy; not fine-tuned after conversion, which long texts need.",
        "shape": {"num_heads": 12, "head_dim": 32},
    },
]


def card(spec: dict, results: dict) -> str:
    sparse, dense = (results[f"{spec['which']} {kind}"] for kind in ("sparse", "dense"))
    if "quality" in sparse:
        quality = f"| perplexity | {sparse['quality']:.2f} | {dense['quality']:.2f} |"
    else:
        alike = sum(a * b for a, b in zip(sparse["embedding"], dense["embedding"], strict=True))
        quality = f"| cosine of the document's embedding to the dense one | {alike:.3f} | 1 |"
    facts = describe(spec["pattern"], spec["length"], **spec["shape"])
    whom = "every earlier one" if spec["which"] == "decoder" else "every other"
    data = ModelCardData(
        license="apache-2.0", base_model=spec["base"], library_name="transformers", pipeline_tag=spec["tag"],
        tags=["sparse-attention", "long-context", "sparse_hf"],
    )  # fmt: skip
    body = BODY.format(
        **spec, facts=facts, dense_pairs=spec["length"] ** 2, mean=facts.keys_per_query[1], sparse=sparse, dense=dense,
        quality=quality, whom=whom,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n{body}"


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
