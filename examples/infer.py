"""Read a text file with a decoder made sparse in memory, and write on behind it.

    python examples/infer.py --model your/llama --text novel.txt
    python examples/infer.py --model your/llama --text novel.txt --pattern "window(1023, 0) | first(4)" --device cuda

The text is read in pieces, and the cache keeps what the pattern still sees, so that memory does not
grow with the text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_hf


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A decoder: a folder or a hub id.")
    parser.add_argument("--text", type=Path, required=True, help="A file in UTF-8.")
    parser.add_argument("--pattern", default="window(1023, 0) | first(4)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # the weights are shared, so the dense model costs nothing beside it
    model = sparse_hf.sparsify(AutoModelForCausalLM.from_pretrained(args.model), args.pattern).eval().to(args.device)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    with torch.inference_mode():
        tokens = model.generate(
            ids.to(args.device), cache_implementation="streaming", prefill_chunk_size=1024, do_sample=False,
            max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    said = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    print(f"{ids.shape[1]:,} tokens read\n{said}")
    return said


if __name__ == "__main__":
    main()
