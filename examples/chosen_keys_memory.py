"""Bytes that a layer which chooses its keys by content holds at once, here and in Transformers' class: counted, not timed.

One layer of each family with a tiny width and a dense feed-forward part reads a text, forward and backward. On the CPU the bytes
of tensors are counted, so that they are the same in every run; on a GPU they are the most that is allocated, above what was
before, and scores are made in larger pieces, of up to 2^27 numbers.

    python examples/chosen_keys_memory.py
    python examples/chosen_keys_memory.py --device cuda --longest 65536 --out docs/results
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from sparse_hf.bench import chosen_device, environment, peak_bytes, result_path, write_json
from sparse_hf.testing import LiveBytes

# the shortest text, the longest one, and the longest that Transformers' class is counted at
SHORTEST, LONGEST, LONGEST_OF_STOCK = 2048, 8192, 8192
MLA = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8,
    "index_topk": 64, "index_head_dim": 16, "index_n_heads": 2, "max_position_embeddings": 1 << 17, "pad_token_id": 0,
    "mlp_layer_types": ["dense"],
}  # fmt: skip
GROUPED = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 1 << 17, "pad_token_id": 0,
}  # fmt: skip
OF_IMAGES = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
FAMILIES: dict[str, dict[str, Any]] = {
    "axk2": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {
        **GROUPED, "moe_intermediate_size": 16, "q_lora_rank": 16, "n_routed_experts": 4, "o_groups": 2, "o_lora_rank": 8,
        "sliding_window": 32, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 32, "hc_mult": 2, "partial_rotary_factor": 0.5,
        "layer_types": ["compressed_sparse_attention"], "mlp_layer_types": ["moe"],
    },
    "dots3_note_text": {**MLA, "layer_types": ["indexed_attention"], "head_dim": 16},
    "glm5_next_text": {**MLA, "qk_rope_head_dim": 0, "index_kpool": 4, "layer_types": ["indexed_attention"]},
    "glm_moe_dsa": MLA,
    "hy_v4": MLA,
    "hy_v4_vl_text": {**MLA, "rope_parameters": OF_IMAGES},
    "minimax_m3_vl_text": {
        **GROUPED, "num_local_experts": 4, "dense_intermediate_size": 64, "rotary_dim": 8, "index_n_heads": 1, "index_head_dim": 16,
        "index_block_size": 16, "index_topk_blocks": 4, "layer_types": ["minimax_m3_sparse"], "mlp_layer_types": ["dense"],
    },
    "mistral_large4_text": {name: value for name, value in MLA.items() if name != "q_lora_rank"},
    "qwen4_exp_text": {
        **GROUPED, "layer_types": ["indexed_attention"], "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "num_experts": 4, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [], "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4,
    },
}  # fmt: skip


def held(model: Any, length: int, device: torch.device) -> int:
    """Bytes that a forward and a backward pass hold at once."""
    ids = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0)).to(device)

    def work() -> None:
        model(input_ids=ids, use_cache=False)[0].square().mean().backward()
        model.zero_grad()

    if device.type == "cuda":
        found = peak_bytes(work, device)
        assert found is not None
        return found
    with LiveBytes() as live:
        work()
    return live.peak


def counted(family: str, longest: int, device: torch.device, console: Console) -> list[dict[str, Any]]:
    """Rows of a family: a length, bytes here and in Transformers' class."""
    torch.manual_seed(0)
    dense = AutoModel.from_config(AutoConfig.for_model(family, **FAMILIES[family])).to(device)
    sparse, rows = sparse_hf.sparsify(dense), []
    for length in (SHORTEST << i for i in range((longest // SHORTEST).bit_length())):
        # the dense class of Qwen4-Exp loops over queries
        stock = length <= (SHORTEST if family == "qwen4_exp_text" else LONGEST_OF_STOCK)
        row = {
            "tokens": length,
            "bytes": held(sparse, length, device),
            "stock_bytes": held(dense, length, device) if stock else None,
        }
        rows.append(row)
        console.print(family, row)
    return rows


def slope(rows: list[dict[str, Any]], of: str) -> float | None:
    """By what power of the length the bytes grow, from the first to the last row that has them."""
    known = [row for row in rows if row[of]]
    if len(known) < 2:
        return None
    growth = math.log(known[-1][of] / known[0][of]) / math.log(known[-1]["tokens"] / known[0]["tokens"])
    return round(growth, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens of the longest text, here alone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder of results")
    given, console = parser.parse_args(), Console()
    device, found = chosen_device(given.device), {}
    for family in given.families:
        if family not in CONFIG_MAPPING:
            console.print(f"{family}: this version of Transformers has no such family")
            continue
        rows = counted(family, given.longest, device, console)
        found[family] = {
            "rows": rows,
            "slope": slope(rows, "bytes"),
            "slope_of_last": slope(rows[-2:], "bytes"),
            "stock_slope": slope(rows, "stock_bytes"),
        }
    table = Table("family", "tokens", "MiB here", "MiB in Transformers")
    for family, content in found.items():
        for row in content["rows"]:
            stock = "-" if row["stock_bytes"] is None else f"{row['stock_bytes'] / 2**20:.1f}"
            table.add_row(family, f"{row['tokens']:,}", f"{row['bytes'] / 2**20:.1f}", stock)
    console.print(table)
    if given.out:
        unit = "bytes that are allocated" if device.type == "cuda" else "bytes of tensors"
        content = {
            "environment": environment(device),
            "unit": f"{unit} at once, forward and backward, one layer",
            "families": found,
        }
        path = result_path(given.out, content["environment"], "chosen-keys-memory")
        if path.exists():
            # of other families, counted before
            content["families"] = json.loads(path.read_text(encoding="utf-8"))["families"] | found
        write_json(content, path)
        console.print(path)


if __name__ == "__main__":
    main()
