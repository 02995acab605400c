"""What share of a model's own attention patterns keep that choose keys by content, beside windows of as many keys.

The dense model reads a book. Some queries of its second half say, layer by layer, what weight lies on the pairs that a pattern
holds; each pattern chooses from the dense model's queries and keys. A text beyond the model's trained length has its positions
stretched by YaRN, and nothing is trained.

    python examples/chosen_mass.py --tiny
    python examples/chosen_mass.py --model qwen2.5-coder-0.5b --lengths 32768,131072 --dtype bfloat16 --out docs/results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples.checkpoints import checkpoint
from examples.texts import moby_dick
from sparse_hf.attention import HeldPairs, held_pairs
from sparse_hf.bench import chosen_device, environment, result_path, write_json
from sparse_hf.conversion.positions import scale_rope, set_length
from sparse_hf.evaluation.mass import Scores, attention_weights
from sparse_hf.evaluation.observe import layer_of, observed
from sparse_hf.models.hf.register import family_of

PATTERNS = (
    "window(127, 0)",
    "window(2175, 0)",
    "window(2047, 0) | first(128)",
    "(window(127, 0) | topk_blocks(16, 128, 'mean', 128)) & window(None, 0)",
    "(window(127, 0) | topk_blocks(16, 128, 'bounds', 128)) & window(None, 0)",
    "(window(1023, 0) | topk_blocks(16, 128, 'bounds', 128)) & window(None, 0)",
    "(window(127, 0) | topk_blocks(32, 64, 'bounds', 64)) & window(None, 0)",
    "(window(127, 0) | topk_blocks(32, 128, 'bounds', 128)) & window(None, 0)",
)
CAUSAL = "window(None, 0)"


class Shares:
    """What each pattern keeps, seen layer by layer: the mean of all heads and queries, and the head that keeps least."""

    def __init__(self, patterns: Sequence[str], queries: int):
        self.patterns, self.queries = patterns, queries
        self.by_layer: dict[str, dict[int, float]] = {text: {} for text in patterns}
        self.least: dict[str, float] = dict.fromkeys(patterns, 1.0)
        self.keys: dict[str, list[float]] = {text: [] for text in patterns}

    def see(self, module: Any, q: Tensor, k: Tensor, arguments: dict[str, Any]) -> None:
        length, layer = q.shape[2], layer_of(module, len(self.by_layer[self.patterns[0]]))
        queries = torch.linspace(length // 2, length - 1, self.queries, device=q.device).long()
        scores, keys = Scores.of(q, arguments), torch.arange(length, device=q.device)
        of_heads = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
        weights, _ = attention_weights(q[0, :, queries], of_heads, scores, keys <= queries[:, None])
        for text in self.patterns:
            held = self._held(text, q, k, scores, queries, keys)
            kept = (weights * held).sum(-1).mean(-1)
            self.by_layer[text][layer] = float(kept.mean())
            self.least[text] = min(self.least[text], float(kept.min()))
            self.keys[text].append(float(held.sum(-1).float().mean()))

    def _held(self, text: str, q: Tensor, k: Tensor, scores: Scores, queries: Tensor, keys: Tensor) -> Tensor:
        """`[1 or H, m, K]` bool."""
        if sparse_hf.Pattern.parse(text).uses_content:
            pairs: HeldPairs = held_pairs(q, k, text, scores.scale, scores.softcap)
            return pairs.mask(queries)[0]
        plan = sparse_hf.build_plan(text, len(keys), len(keys), device=q.device)
        return plan.allows(torch.zeros((), dtype=torch.long, device=q.device), 0, queries[:, None], keys)[None]

    def rows(self, length: int) -> list[dict[str, Any]]:
        return [
            {
                "n": length,
                "pattern": text,
                "mass": sum(layers.values()) / len(layers),
                "least_head": self.least[text],
                "keys": sum(self.keys[text]) / len(self.keys[text]),
                "mass_of_layers": {str(layer): share for layer, share in sorted(layers.items())},
            }
            for text, layers in self.by_layer.items()
        ]


def stretched(config: PreTrainedConfig, length: int) -> PreTrainedConfig:
    """The configuration for texts of that length: as it is, or with YaRN."""
    family = family_of(config.model_type)
    old, new = set_length(config, family.positions, max(length, config.max_position_embeddings))
    if new != old:
        scale_rope(config, family, "yarn", old, new)
    return config


def measured(folder: Path, length: int, patterns: Sequence[str], queries: int, dtype: str) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = moby_dick()
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < length:
        raise ValueError(f"the book has {ids.shape[1]:,} tokens, and --lengths names {length:,}; name a shorter one")
    config = stretched(AutoConfig.from_pretrained(folder), length)
    dense = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=getattr(torch, dtype))
    model = sparse_hf.sparsify(dense, "full()").eval()
    torch.nn.Module.to(model, chosen_device(None))
    shares = Shares(patterns, queries)
    with torch.inference_mode(), observed(model, shares.see):
        model.base_model(input_ids=ids[:, :length].to(model.device), use_cache=False)
    return shares.rows(length)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a checkpoint of examples/checkpoints.py, or a folder")
    parser.add_argument("--lengths", default="8192", help="tokens of the text, with commas")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--queries", type=int, default=256, help="queries of the second half that are asked")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", help="a folder of results, or a file")
    parser.add_argument("--tiny", action="store_true", help="1,024 tokens and two patterns, in a minute on a CPU")
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    lengths = [1024] if given.tiny else [int(part) for part in given.lengths.split(",")]
    patterns = [PATTERNS[0], "(window(127, 0) | topk_blocks(4, 64, 'bounds', 64)) & window(None, 0)"]
    patterns = patterns if given.tiny else given.patterns
    folder = Path(given.model) if Path(given.model).is_dir() else checkpoint(given.model)
    told = environment(chosen_device(None))
    result = {
        "benchmark": "chosen-mass",
        "model": folder.name,
        "queries": given.queries,
        "dtype": given.dtype,
        "rows": [],
    }
    table = Table("tokens", "pattern", "keys", "kept", "least head")
    for length in lengths:
        for row in measured(folder, length, patterns, given.queries, given.dtype):
            result["rows"].append(row)
            figures = f"{row['keys']:,.0f}", f"{row['mass']:.3f}", f"{row['least_head']:.3f}"
            table.add_row(f"{length:,}", row["pattern"], *figures)
        if given.out:
            write_json({**result, "environment": told}, result_path(given.out, told, f"chosen-mass-{folder.name}"))
    Console().print(table)


if __name__ == "__main__":
    main()
