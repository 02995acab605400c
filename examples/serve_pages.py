"""What requests of continuous batching hold and read: pages in bytes, keys a pass, and the CPU seconds of a decoded one.

A decoder of random weights answers a few long requests at once through `generate_batch`: dense, under a pattern whose pages are given
back, and under one without an end, which keeps all. Bytes and keys are counted, so that they are the same in every run.

    python examples/serve_pages.py
    python examples/serve_pages.py --tokens 16384 --out docs/results
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from sparse_hf.bench import SHAPES, environment, result_path, write_json

# None is the dense model
PATTERNS = (None, "window(1019, 0) | first(4)", "stride(64) | window(1019, 0)")
# tokens of a page, and of a prompt that are read at a time
PAGE, PIECE = 256, 1024


class Passes:
    """Notes of each pass of a server how many new tokens it has, what its requests hold and read, and how long it takes."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Passes:
        self.step = step = ContinuousBatchProcessor._generation_step

        def watched(server: Any, *args: Any) -> Any:
            begin = time.process_time()
            result = step(server, *args)
            kinds, inputs = server.cache.cache_allocators.values(), server.inputs_and_outputs
            held = sum(kind.bytes_per_block * len(pages) for kind in kinds for pages in kind.block_table.values())
            keys = {kind.layer_type: inputs.total_seqlen_k[kind.layer_type] * len(kind.layer_indices) for kind in kinds}
            row = {"new": inputs.num_q_tokens, "bytes": held, "keys": sum(keys.values())}
            self.rows.append({**row, "cpu_s": time.process_time() - begin})
            return result

        ContinuousBatchProcessor._generation_step = watched
        return self

    def __exit__(self, *error: object) -> None:
        ContinuousBatchProcessor._generation_step = self.step


def measured(model: Any, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Figures of a model that answers all prompts at once."""
    # Transformers admits no request to the last part of its memory
    pages = 2 * sum(-(-(len(ids) + new) // PAGE) for ids in prompts)
    given = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=PIECE)
    how = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1)
    begin = time.process_time()
    with Passes() as passes:
        found = model.generate_batch(
            prompts, generation_config=how, continuous_batching_config=given, progress_bar=False
        )
    total_s = time.process_time() - begin
    assert not any(answer.error for answer in found.values())
    decoded = [row for row in passes.rows if row["new"] == len(prompts)]
    return {
        "most_bytes": max(row["bytes"] for row in passes.rows),
        # of all layers
        "keys_a_pass": decoded[-1]["keys"],
        "decoded_cpu_s": statistics.median(row["cpu_s"] for row in decoded),
        "total_cpu_s": total_s,
    }


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--tokens", type=int, default=8192, help="tokens of each prompt")
    reader.add_argument("--requests", type=int, default=4)
    reader.add_argument("--new", type=int, default=32, help="new tokens of each")
    reader.add_argument("--layers", type=int, default=4, help="of SmolLM2-135M's shape")
    reader.add_argument("--out", help="write a result there")
    asked = reader.parse_args()
    torch.manual_seed(0)
    shape = {**SHAPES["smollm2-135m"], "num_hidden_layers": asked.layers}
    config = LlamaConfig(**shape, max_position_embeddings=2 * asked.tokens, eos_token_id=None, bos_token_id=None)
    dense = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    prompts = torch.randint(5, config.vocab_size, (asked.requests, asked.tokens)).tolist()
    facts, rows, table = environment(torch.device("cpu")), [], Table("", "pages, MiB", "keys a pass", "CPU ms a pass")
    for pattern in PATTERNS:
        model: Any = dense if pattern is None else sparse_hf.sparsify(dense, pattern)
        rows.append({"name": pattern or "dense", **measured(model, prompts, asked.new)})
        row = rows[-1]
        held, took = row["most_bytes"] / 2**20, row["decoded_cpu_s"] * 1e3
        table.add_row(row["name"], f"{held:,.1f}", f"{row['keys_a_pass']:,}", f"{took:,.1f}")
    Console().print(table)
    if asked.out:
        result = {
            "benchmark": "serve-pages",
            "environment": facts,
            **vars(asked),
            "page": PAGE,
            "piece": PIECE,
            "rows": rows,
        }
        del result["out"]
        write_json(result, result_path(asked.out, facts, "serve-pages"))


if __name__ == "__main__":
    main()
