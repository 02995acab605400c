"""Which models `sparse-hf bench generate` runs, and with which caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from ..models import sparsify
from ..models.hf.config import SparseConfigMixin
from .measure import DTYPES

# Llama 3.2 1B, and SmolLM2-135M, by their configurations
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and its cache.

    Attributes:
        name: what readers call it.
        kind: "dense", Transformers' own class, or "ours".
        cache: what `cache_implementation` says.
    """

    name: str
    kind: str
    cache: str


# by what `--cases` calls them
CASES: dict[str, Case] = {
    "dense-dynamic": Case("dense, dynamic", "dense", "dynamic"),
    "dense-static": Case("dense, static", "dense", "static"),
    "dynamic": Case("sparse_hf, dynamic", "ours", "dynamic"),
    "streaming": Case("sparse_hf, streaming", "ours", "streaming"),
    "static": Case("sparse_hf, static", "ours", "static"),
}


@dataclass(frozen=True)
class Models:
    """A dense model, and ours with the same weights."""

    dense: PreTrainedModel
    ours: PreTrainedModel

    def of(self, case: Case) -> PreTrainedModel:
        return self.ours if case.kind == "ours" else self.dense

    def cast(self, dtype: torch.dtype) -> None:
        """Give both weights another dtype; what is computed of positions keeps its own."""
        for weight in self.dense.parameters():
            weight.data = weight.data.to(dtype)


def load_models(model: str, pattern: str, longest: int, dtype: str, device: torch.device) -> Models:
    """The models of a shape, a folder or a hub id.

    Args:
        model: a name of `SHAPES`, whose weights are random, or where a dense checkpoint is.
        pattern: text of the pattern of ours, in every layer.
        longest: tokens of the longest text, which a shape has positions for.
        dtype: a name of `DTYPES`.

    Raises:
        ValueError: a checkpoint that is sparse already, or a bad pattern.
    """
    torch.manual_seed(0)
    given = {"dtype": DTYPES[dtype], "attn_implementation": "sdpa"}
    if model in SHAPES:
        config = LlamaConfig(
            **SHAPES[model],
            max_position_embeddings=longest,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        with device:
            dense = AutoModelForCausalLM.from_config(config, **given)
    else:
        if isinstance(AutoConfig.from_pretrained(model), SparseConfigMixin):
            raise ValueError(f"{model} is sparse already; give the dense model that it was made of, and --pattern")
        dense = AutoModelForCausalLM.from_pretrained(model, **given)
        dense.to(device)  # pyright: ignore[reportArgumentType]  # Transformers wraps Module.to
    dense.eval()
    ours = sparsify(dense, pattern)
    for each in (dense, ours):
        # no token ends a text, none is forbidden
        each.generation_config = GenerationConfig(pad_token_id=0)
    return Models(dense, ours)
