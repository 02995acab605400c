"""Find the documents that answer a question: long ones are read whole, by a sparse encoder.

    python examples/retrieve.py --model long-encoder --question "who pays the rent" contracts/*.txt

--model is a sparse folder, as `embed.py` or `sparse-hf convert` writes it, or a dense encoder that
is made sparse in memory and reads as far as it has positions. Vectors are means of the last states.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

import sparse_hf


def main(arguments: list[str] | None = None) -> list[tuple[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="An encoder with mean pooling: a folder or a hub id.")
    parser.add_argument("--question", required=True)
    parser.add_argument("--best", type=int, default=5, help="How many documents are named.")
    parser.add_argument("--pattern", default="window(128, 128) | first(1)", help="Of a model that is dense.")
    parser.add_argument("documents", nargs="+", type=Path)
    args = parser.parse_args(arguments)
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).eval()
    if not AutoConfig.from_pretrained(args.model).model_type.startswith("sparse_"):
        model = sparse_hf.sparsify(model, args.pattern).eval()
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @torch.inference_mode()
    def vector(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        return torch.nn.functional.normalize(model(**ids).last_hidden_state[0].mean(0), dim=0)

    asked = vector(args.question)
    # one by one: documents of very different lengths would pad each other
    scores = [(path.name, float(asked @ vector(path.read_text(encoding="utf-8")))) for path in args.documents]
    found = sorted(scores, key=lambda one: -one[1])[: args.best]
    for name, score in found:
        print(f"{score:.3f}  {name}")
    return found


if __name__ == "__main__":
    main()
