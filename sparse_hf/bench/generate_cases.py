"""Which models `sparse-hf bench generate` runs, and with which caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
)

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
        kind: "dense", Transformers' own class; "ours"; or "drafted", that class with ours as its assistant.
        cache: what `cache_implementation` says; None is what `generate` takes by itself, for a draft a streaming cache.
    """

    name: str
    kind: str
    cache: str | None


# by what `--cases` calls them
CASES: dict[str, Case] = {
    "dense-dynamic": Case("dense, dynamic", "dense", "dynamic"),
    "dense-static": Case("dense, static", "dense", "static"),
    "dynamic": Case("sparse_hf, dynamic", "ours", "dynamic"),
    "streaming": Case("sparse_hf, streaming", "ours", "streaming"),
    "static": Case("sparse_hf, static", "ours", "static"),
    "draft": Case("dense, sparse_hf drafts", "drafted", None),
}


@dataclass(frozen=True)
class Models:
    """A dense model, ours with the same weights, and the ids `[N]` of a text that prompts are taken from; None is any ids."""

    dense: PreTrainedModel
    ours: PreTrainedModel
    text: Tensor | None = None

    def of(self, case: Case) -> PreTrainedModel:
        return self.ours if case.kind == "ours" else self.dense

    def prompt(self, rows: int, n: int) -> Tensor:
        """`[rows, n]` ids, the same in every run: of rows that begin at different places of the text, or any but those for padding.

        Raises:
            ValueError: a text with fewer tokens than that.
        """
        if self.text is None:
            words = self.dense.config.get_text_config().vocab_size
            return torch.randint(3, words, (rows, n), generator=torch.Generator().manual_seed(n)).to(self.dense.device)
        if n > len(self.text):
            raise ValueError(
                f"the text has {len(self.text):,} tokens, and a prompt of {n:,} is asked for; give a longer text"
            )
        begins = torch.arange(rows) * (len(self.text) - n) // max(1, rows)
        return torch.stack([self.text[begin : begin + n] for begin in begins.tolist()]).to(self.dense.device)

    def cast(self, dtype: torch.dtype) -> None:
        """Give both weights another dtype; what is computed of positions keeps its own."""
        for weight in self.dense.parameters():
            weight.data = weight.data.to(dtype)


def load_models(
    model: str, pattern: str, longest: int, dtype: str, device: torch.device, text: str | None = None
) -> Models:
    """The models of a shape, a folder or a hub id.

    Args:
        model: a name of `SHAPES`, whose weights are random, or where a dense checkpoint is.
        pattern: text of the pattern of ours, in every layer.
        longest: tokens of the longest text, which a shape has positions for.
        dtype: a name of `DTYPES`.
        text: a file that prompts are taken from.

    Raises:
        ValueError: a checkpoint that is sparse already, a bad pattern, or a text for a shape, which has no tokenizer.
    """
    if text is not None and model in SHAPES:
        raise ValueError(f"a text needs a tokenizer, which the shape {model!r} has not; give a checkpoint (--model)")
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
        # no token ends a text, none is forbidden; random weights are sure of nothing, and draft all the same
        given = {"assistant_confidence_threshold": 0.0} if model in SHAPES else {}
        each.generation_config = GenerationConfig(pad_token_id=0, **given)
    return Models(dense, ours, None if text is None else _read(text, model))


def _read(text: str, model: str) -> Tensor:
    """The ids `[N]` of a file."""
    read = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"), verbose=False)
    return torch.tensor(read["input_ids"])
