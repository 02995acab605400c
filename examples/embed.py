"""Embed long documents with an encoder of short ones, made sparse and given more positions.

    python examples/embed.py --model your/sentence-encoder --length 4096 --out vectors.pt letter.txt novel.txt

The folder that is converted stays (--folder), and Sentence Transformers loads it as well. A model that was
trained on short texts alone should be trained on long ones, before much is built on its vectors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import sparse_hf


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="An encoder with mean pooling: a folder or a hub id.")
    parser.add_argument("files", nargs="+", type=Path, help="Documents in UTF-8.")
    parser.add_argument("--length", type=int, default=4096, help="Tokens of a document that are read, at most.")
    parser.add_argument("--pattern", default="window(128, 128) | first(1)")
    parser.add_argument("--folder", type=Path, default=Path("long-encoder"), help="Where the converted model goes.")
    parser.add_argument("--out", type=Path, help="A file for the vectors.")
    args = parser.parse_args(arguments)
    if args.folder.exists():
        print(f"{args.folder} is taken as it is; give another --folder for another model, pattern or length")
    else:
        sparse_hf.convert(args.model, args.folder, args.pattern, max_length=args.length, progress=False)
    tokenizer, model = AutoTokenizer.from_pretrained(args.folder), AutoModel.from_pretrained(args.folder).eval()
    texts = [path.read_text(encoding="utf-8") for path in args.files]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=args.length, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state  # [documents, tokens, width]
    real = batch.attention_mask[..., None]
    vectors = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    print(f"{len(vectors)} documents of {batch.attention_mask.sum(1).tolist()} tokens; their cosines:")
    for row in (vectors @ vectors.T).tolist():
        print("  " + " ".join(f"{cosine:.2f}" for cosine in row))
    if args.out:
        torch.save(vectors, args.out)
    return vectors


if __name__ == "__main__":
    main()
