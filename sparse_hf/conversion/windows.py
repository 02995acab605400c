"""How the configurations of Transformers say that layers slide over a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.hf.config import SparseConfigMixin

# families with one window on all layers; with layers that have it and layers that have none; and with layers of two
# kinds that also turn their angles at different speeds, or not at all, so that a layer's kind must stay
UNIFORM, BY_LAYER, TYPED = (
    ("mistral", "mixtral", "phi3", "qwen3_moe"),
    ("gemma2", "qwen2", "qwen3", "smollm3"),
    ("gemma3_text", "modernbert", "cohere2"),
)
# what Llama has and Mistral, the same code with a window, has not
BIASES = ("attention_bias", "mlp_bias")
LLAMA_ONLY = (*BIASES, "pretraining_tp", "layer_types")
FULL, SLIDING = "full_attention", "sliding_attention"


def mistral_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a Llama that Mistral takes too. The caller refuses biases, which it has not."""
    return {key: value for key, value in values.items() if key not in LLAMA_ONLY}


def size_values(config: SparseConfigMixin, size: int | None, kinds: Sequence[str] | None) -> dict[str, Any]:
    """The fields that give layers a window of `size` tokens, the query itself counted; None is no window.

    `kinds` says which layers have it, where the family tells them apart.
    """
    values: dict[str, Any] = {} if kinds is None else {"layer_types": list(kinds)}
    # without it Transformers would drop the window again
    if hasattr(config, "use_sliding_window"):
        values["use_sliding_window"] = size is not None
    elif size is None and kinds is not None:
        # Gemma 2 wants a size even where no layer has it
        return values
    if hasattr(config, "max_window_layers") and kinds is not None:
        values["max_window_layers"] = next((i for i, kind in enumerate(kinds) if kind != FULL), len(kinds))
    return {**values, "sliding_window": size}
