"""Tiny random models of the families that choose keys by content, and ties broken as here: one line a family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

import sparse_hf

# kinds of layers were called after their family in older versions of Transformers
OLD = "indexed_attention" not in DYNAMIC_LAYER_TYPE_MAPPING
INDEXED, POOLED = ("deepseek_sparse_attention", "qwen_sparse_attention") if OLD else ("indexed_attention",) * 2
VOCABULARY, LENGTH, PADDED, EOS = 97, 150, 37, 2
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
MLA = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
    "index_topk": 16, "index_head_dim": 16, "index_n_heads": 8, "max_position_embeddings": 512,
}  # fmt: skip
SLIDING = {
    "layer_types": [INDEXED, "sliding_attention"] * 2, "sliding_window": 20, "head_dim": 24, "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2, "swa_q_lora_rank": 20, "swa_kv_lora_rank": 12, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 10,
}  # fmt: skip
GROUPED = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip
OF_IMAGES = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
# dense model type -> its tiny configuration: fewer keys are chosen than a text has
TINY: dict[str, dict[str, Any]] = {
    "axk2": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {
        **TOKENS, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
        "q_lora_rank": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 20,
        "index_n_heads": 8, "index_head_dim": 16, "index_topk": 6, "hc_mult": 2, "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "max_position_embeddings": 512,
    },
    "dots3_note_text": {**MLA, **SLIDING},
    "glm5_next_text": {
        **MLA, "qk_rope_head_dim": 0, "index_kpool": 4,
        "layer_types": [INDEXED, INDEXED, "linear_attention", INDEXED],
        "indexer_types": ["full", "shared", "full", "full"], "linear_head_dim": 8, "linear_num_heads": 4, "hc_mult": 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "glm_moe_dsa": {**MLA, "index_topk_pattern": "FSFS"},
    "hy_v4": MLA,
    "hy_v4_vl_text": {**MLA, "rope_parameters": OF_IMAGES},
    "minimax_m3_vl_text": {
        **GROUPED, "num_local_experts": 4, "dense_intermediate_size": 64, "shared_intermediate_size": 32, "rotary_dim": 8,
        "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 8, "index_topk_blocks": 3,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "mistral_large4_text": {
        **{name: value for name, value in MLA.items() if name != "q_lora_rank"},
        "index_topk_pattern": "FSFS", "no_rope_layers": [1, 1, 0, 1], "kv_source_layers": [0, 0, 2, 3],
    },
    "qwen4_exp_text": {
        **GROUPED, "layer_types": [POOLED, "linear_attention"] * 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "num_experts": 4, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [], "indexer_n_heads": 8, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
}  # fmt: skip
# those that this version of Transformers has
TYPES = [name for name, family in sparse_hf.FAMILIES.items() if name in TINY]


def heads(ending: str = "") -> list[str]:
    """Names of the dense classes."""
    names = [sparse_hf.dense_class(c).__name__ for name in TYPES for c in sparse_hf.FAMILIES[name].classes]
    return [name for name in names if name.endswith(ending)]


def family_and_kind(head: str, side: str) -> tuple[str, str, str]:
    """What counts in a cross: the family, what the head is for, and the side of the padding."""
    family = next(
        name for name in TYPES if head in {sparse_hf.dense_class(c).__name__ for c in sparse_hf.FAMILIES[name].classes}
    )
    return family, head.rpartition("For")[2], side


def one_head() -> list[str]:
    """Of each family the language model, or the model where it has none of text alone."""
    chosen = []
    for name in TYPES:
        of_family = [sparse_hf.dense_class(c).__name__ for c in sparse_hf.FAMILIES[name].classes]
        chosen += [next((head for head in of_family if head.endswith("ForCausalLM")), of_family[0])]
    return chosen


def dense_model(head: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sparse = getattr(sparse_hf, f"Sparse{head}")
    config = sparse.config_class.__bases__[1](
        **{**TINY[sparse_hf.family_of(sparse.config_class.model_type).dense_type], **changes}
    )
    model = sparse_hf.dense_class(sparse)(config).eval()
    for parameter in model.parameters():
        # initial weights make nearly equal scores, and norms that do nothing
        parameter.data.mul_(3) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(side: str = "none", labels: bool = True) -> dict[str, torch.Tensor]:
    """A batch, the first row of which is padded on a side; positions are those of the tokens."""
    generator = torch.Generator().manual_seed(3)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    if side != "none":
        real[0, slice(PADDED) if side == "left" else slice(LENGTH - PADDED, None)] = 0
    ids = torch.randint(EOS + 1, VOCABULARY, (2, LENGTH), generator=generator) * real
    batch = {"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    # the first token behind padding is predicted from padding
    return {**batch, "labels": ids.masked_fill((real == 0) | (real.roll(1, 1) == 0), -100)} if labels else batch


@contextmanager
def lower_key_first() -> Iterator[None]:
    """Within, `topk` takes the first of equal numbers, which Transformers leaves to chance: scores behind a ReLU are often 0."""

    def topk(self: torch.Tensor, k: int, dim: int = -1, **_: Any) -> Any:
        values, indices = self.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", topk)
        yield
