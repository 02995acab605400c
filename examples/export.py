"""Export an encoder as a graph of PyTorch, and a decoder with a sliding window to Transformers' own class.

    python examples/export.py graph --model your/bert --pattern "window(128, 128) | first(1)" --out bert.pt2
    python examples/export.py native --model your/llama --pattern "window(1023, 0)" --out mistral

Both are read back and compared with the sparse model. The native folder needs no sparse_hf. The graph
needs its operator and no model: `import sparse_hf.attention`, then `torch.export.load`. ONNX, which needs
neither, is on the page docs/how-to/export.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

import sparse_hf
from sparse_hf.conversion.export import export


class States(torch.nn.Module):
    """An encoder from its ids to its last states: tensors alone, which every reader of graphs knows."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


def to_graph(model: str, pattern: str, out: Path) -> float:
    """Write an encoder as a graph for every length; the largest difference at another length than the example's."""
    sparse = sparse_hf.sparsify(AutoModel.from_pretrained(model), pattern).eval()
    longest, words = sparse.config.max_position_embeddings, sparse.config.vocab_size
    example, other = (torch.randint(5, words, (1, length)) for length in (longest // 2, longest - 3))
    lengths = {"input_ids": {1: torch.export.Dim("length", min=2, max=longest)}}
    with torch.no_grad():
        program = torch.export.export(States(sparse), (), {"input_ids": example}, dynamic_shapes=lengths)
        torch.export.save(program, out)
        found = torch.export.load(out).module()(input_ids=other)
        return float((found - sparse(other).last_hidden_state).abs().max())


def to_native(model: str, pattern: str, out: Path) -> float:
    """Write a decoder as a class of Transformers; the largest difference of a logit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = sparse_hf.convert(model, Path(scratch) / "sparse", pattern, progress=False)
        export(folder, out, "native", progress=False)
        sparse, native = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, out))
    ids = torch.randint(5, native.config.vocab_size, (1, min(2048, native.config.max_position_embeddings)))
    print(f"{type(sparse).__name__} -> {type(native).__name__}")
    with torch.inference_mode():
        return float((sparse(ids).logits - native(ids).logits).abs().max())


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", choices=("graph", "native"))
    parser.add_argument("--model", required=True, help="A dense model: a folder or a hub id.")
    parser.add_argument("--pattern", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    differs = (to_graph if args.to == "graph" else to_native)(args.model, args.pattern, args.out)
    print(f"written: {args.out}; largest difference to the sparse model {differs:.1e}")
    return differs


if __name__ == "__main__":
    main()
