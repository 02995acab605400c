"""Training steps on long texts: the models, their batches, and one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from ..models import sparsify
from ..plan import build_plan
from .generate_cases import SHAPES
from .measure import DTYPES

DECODER_PATTERN, ENCODER_PATTERN = "window(1023, 0) | first(4)", "window(256, 256) | first(1)"
# beside the decoders of `sparse-hf bench generate`; "tiny" is for trying a command out
MORE_SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "bert": {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "tiny": {
        "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "tiny-bert": {
        "model_type": "bert", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip
TRAINED_SHAPES = SHAPES | MORE_SHAPES
# ids below are those of special tokens, and 15 % of an encoder's tokens have a label
LOWEST_ID, LABELLED = 5, 0.15


def check_shape(shape: str) -> None:
    if shape not in TRAINED_SHAPES:
        raise ValueError(f"shape is {shape!r}; the known ones are {', '.join(TRAINED_SHAPES)}")


def shape_config(shape: str, longest: int, layers: int | None = None) -> Any:
    """The configuration of a shape with positions for `longest` tokens, and its own layers or so many."""
    check_shape(shape)
    given: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": True, **TRAINED_SHAPES[shape]}
    if given["model_type"] == "llama":
        given |= {"use_cache": False, "bos_token_id": None, "eos_token_id": None}
    given |= {} if layers is None else {"num_hidden_layers": layers}
    return AutoConfig.for_model(given.pop("model_type"), max_position_embeddings=longest, **given)


def dense_model(
    shape: str, longest: int, dtype: str, device: torch.device, layers: int | None = None, **given: Any
) -> PreTrainedModel:
    """The dense model of a shape, with random weights that are the same each time."""
    torch.manual_seed(0)
    config = shape_config(shape, longest, layers)
    auto = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    with device:
        return auto.from_config(config, dtype=DTYPES[dtype], **given).train()


def sparse_model(
    shape: str, longest: int, dtype: str, device: torch.device, pattern: str | None = None, layers: int | None = None
) -> Any:
    """The model of a shape with a pattern, by default a window of a usual size and the first tokens."""
    dense = dense_model(shape, longest, dtype, device, layers)
    return sparsify(dense, pattern or default_pattern(dense)).train()


def default_pattern(model: PreTrainedModel) -> str:
    return ENCODER_PATTERN if _is_encoder(model) else DECODER_PATTERN


def _is_encoder(model: PreTrainedModel) -> bool:
    return "bert" in model.config.model_type


def masked_step(model: PreTrainedModel, batch: dict[str, Tensor], pattern: str | None) -> Tensor:
    """`training_step` of a dense model that is given a pattern as its mask; its loss."""
    ids = batch["input_ids"]
    at, row = torch.arange(ids.shape[1], device=ids.device), ids.new_zeros(1)
    plan = build_plan(pattern or default_pattern(model), len(at), device=ids.device)
    mask = torch.stack([plan.allows(row, p, at[:, None], at[None]) for p in plan.heads or (0,)])
    mask = mask if _is_encoder(model) else mask & (at <= at[:, None])
    return training_step(model, {**batch, "attention_mask": mask[None]})


def make_batch(model: PreTrainedModel, length: int, device: torch.device, seed: int = 1) -> dict[str, Tensor]:
    """A row of random ids with labels: all tokens of a decoder, some of an encoder."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(LOWEST_ID, model.config.vocab_size, (1, length), generator=generator)
    labels = ids.clone()
    if _is_encoder(model):
        labels[torch.rand(ids.shape, generator=generator) > LABELLED] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def in_pieces_of(model: PreTrainedModel, **options: Any) -> Any:
    """`long_text`, imported where it is asked for: Trainer loads accelerate and whatever else is installed."""
    from ..train import long_text

    return long_text(model, **options)


def planned_bytes(model: PreTrainedModel, length: int, way: str, dtype: str) -> int:
    """What `plan_memory` says of a step without an optimizer."""
    from ..train import plan_memory

    return plan_memory(model, length, way=way, optimizer="none", dtype=DTYPES[dtype]).peak


def training_step(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Whole gradients by names of weights."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """How far all gradients are from others, relative to their size."""
    size = sum(float(grad.double().square().sum()) for grad in exact.values())
    apart = sum(float((found[name].double() - grad.double()).square().sum()) for name, grad in exact.items())
    return (apart / size) ** 0.5
