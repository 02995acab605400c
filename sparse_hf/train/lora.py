"""LoRA as long contexts want it: norms and embeddings are trained whole."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def lora_config(model: PreTrainedModel, rank: int = 8, alpha: int = 16, **options):
    """LoRA on every linear layer, with norms and embeddings trained whole.

    So do long contexts want it (LongLoRA, arXiv:2309.12307).

    Args:
        model: the model that it is for, whose norms and embeddings are named.
        rank, alpha: `r` and `lora_alpha` of `peft.LoraConfig`; `options` are its others.

    Examples:
        >>> lora_config(AutoModelForCausalLM.from_pretrained("my-llama"), rank=16).r
        16
    """
    from peft import LoraConfig

    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or type(module).__name__.lower().endswith(("norm", "layernorm"))
    }
    chosen = {"target_modules": "all-linear", "modules_to_save": sorted(names), "ensure_weight_tying": True, **options}
    return LoraConfig(r=rank, lora_alpha=alpha, **chosen)


def add_lora(model: PreTrainedModel, config):
    """`peft.get_peft_model`, with an output layer that stays tied to the embeddings.

    peft trains a copy of the embeddings, which leaves BERT's output layer behind, on the old ones.
    """
    from peft import get_peft_model

    old, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = output is not None and output.weight is old.weight
    adapted = get_peft_model(model, config)
    trained = getattr(model.get_input_embeddings(), "modules_to_save", None)
    output = model.get_output_embeddings()
    if is_tied and trained is not None and isinstance(output, torch.nn.Linear):
        output.weight = trained["default"].weight
    return adapted
