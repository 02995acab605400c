"""Random Perceivers of every head, batches for them, and what a user reads of their answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers.models.perceiver.modeling_perceiver import PerceiverBasicDecoder, PerceiverTextPreprocessor

import sparse_hf

VOCABULARY, POSITIONS, LABELS, OUTPUTS = 97, 64, 5, 11
HEADS = [sparse_hf.dense_class(c).__name__ for c in sparse_hf.FAMILIES["perceiver"].classes]
# beside the bare model, which reads vectors: one with text in front, and a decoder that asks for so many outputs
COMPOSED = "PerceiverModel with a decoder"
KINDS = [*HEADS, COMPOSED]
TEXTS = ("PerceiverForMaskedLM", "PerceiverForSequenceClassification", COMPOSED)
SIDES = ("none", "right", "left", "holes")
# two frames of video with sound, of which a few points are asked for
FRAMES, SAMPLES, PATCH, SIDE = 2, 24, 8, 8
SIZES = {
    "num_latents": 13, "d_latents": 24, "d_model": 16, "num_blocks": 2, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS, "num_labels": LABELS, "attention_probs_dropout_prob": 0.0, "image_size": SIDE,
    "cross_attention_shape_for_attention": "q", "train_size": (6, SIDE), "num_frames": FRAMES,
    "audio_samples_per_frame": SAMPLES, "samples_per_patch": PATCH, "output_shape": (1, FRAMES, SIDE, SIDE),
    "output_num_channels": 20, "_label_trainable_num_channels": 12,
}  # fmt: skip
# ours may err this many times as much as the stock class in float32 does, against the stock class in float64, plus roundings
SLACK, ROUNDING = 4, 2e-6


@dataclass(frozen=True)
class Case:
    """One draw: a head, its sizes, a length, padding."""

    kind: str
    sizes: dict
    length: int
    batch: int
    side: str
    seed: int


def draw(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    kind = KINDS[seed % len(KINDS)]
    qk = pick((None, 12, 36))
    shape = pick(("q", "kv")) if kind in TEXTS else "q"
    sizes = {
        "num_latents": pick((1, 5, 13, 40)),
        "num_blocks": pick((1, 2)),
        "num_self_attends_per_block": pick((1, 2)),
        "num_self_attention_heads": pick((1, 2, 4)),
        # of 16 channels in texts and 24 latent ones
        "num_cross_attention_heads": pick((1, 2, 4)),
        "qk_channels": qk,
        # what the residual asks for
        "v_channels": None if qk is None else 24,
        "cross_attention_shape_for_attention": shape,
        "use_query_residual": pick((True, False)),
        "self_attention_widening_factor": pick((1, 2)),
    }
    return Case(kind, sizes, pick(range(1, POSITIONS + 1)), pick((1, 2, 3)), pick(SIDES), seed)


def stock_model(kind: str, seed: int = 0, **changes):
    """A model of Transformers whose attention is far from uniform."""
    torch.manual_seed(seed)
    config = transformers.PerceiverConfig(**{**SIZES, **changes})
    if kind == COMPOSED:
        queries = {"num_channels": 10, "index_dims": OUTPUTS}
        decoder = PerceiverBasicDecoder(
            config, 7, output_index_dims=OUTPUTS, num_channels=10, trainable_position_encoding_kwargs=queries
        )
        text = PerceiverTextPreprocessor(config)
        model = transformers.PerceiverModel(config, decoder=decoder, input_preprocessor=text).eval()
    else:
        model = getattr(transformers, kind)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(12 if "query" in name or "key" in name else 3)
    return model


def inputs(kind: str, length: int = 37, batch: int = 2, side: str = "right", seed: int = 0) -> dict:
    """A batch with labels where the head has a loss; `length` is of texts and vectors, images have their size."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def numbers(*shape):
        return torch.randn(batch, *shape, generator=generator)

    tokens = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels = {"labels": torch.randint(0, LABELS, (batch,), generator=generator)}
    if kind == "PerceiverForMultimodalAutoencoding":
        given = {
            "audio": numbers(FRAMES * SAMPLES, 1),
            "image": numbers(FRAMES, 3, SIDE, SIDE),
            "label": numbers(LABELS),
        }
        points = {"image": torch.arange(3, 20), "audio": torch.arange(1, 5), "label": None}
        found = {"inputs": given, "subsampled_output_points": points}
        count = FRAMES * SAMPLES // PATCH + FRAMES * (SIDE // 4) ** 2 + 1
    else:
        made, count = {
            "PerceiverModel": ({"inputs": numbers(length, 16)}, length),
            COMPOSED: ({"inputs": tokens}, length),
            "PerceiverForMaskedLM": ({"input_ids": tokens, "labels": tokens.roll(1, 1)}, length),
            "PerceiverForSequenceClassification": ({"input_ids": tokens, **labels}, length),
            "PerceiverForImageClassificationLearned": ({"pixel_values": numbers(3, SIDE, SIDE), **labels}, SIDE**2),
            "PerceiverForImageClassificationFourier": ({"pixel_values": numbers(3, 9, 7), **labels}, 63),
            "PerceiverForImageClassificationConvProcessing": ({"pixel_values": numbers(3, 32, 32), **labels}, 49),
            "PerceiverForOpticalFlow": ({"inputs": numbers(2, 27, 6, SIDE)}, 6 * SIDE),
        }[kind]
        found = made
    mask = _real(side, batch, count, generator)
    return found if mask is None else {**found, "attention_mask": mask}


def _real(side: str, batch: int, count: int, generator) -> Tensor | None:
    if side == "none":
        return None
    real = torch.ones(batch, count, dtype=torch.long)
    cut = int(torch.randint(count // 2 + 1, (), generator=generator))
    if side == "holes":
        real[:, 1:] = (torch.rand(batch, count - 1, generator=generator) < 0.7).long()
    elif cut:
        real[0, slice(cut) if side == "left" else slice(count - cut, None)] = 0
    return real


def for_stock(kind: str, batch: dict) -> dict:
    """The batch as the stock class takes it: its language model wants a label for each row of its table of positions."""
    if kind != "PerceiverForMaskedLM":
        return batch
    short = POSITIONS - batch["labels"].shape[1]
    return {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, short), value=-100)}


def answers(model, batch: dict) -> dict[str, Tensor]:
    """Loss, logits, latents after every layer, and the gradients of every parameter."""
    outputs = model(**batch, output_hidden_states=True)
    found = {}
    for name, value in outputs.items():
        if isinstance(value, dict):
            found |= {f"{name} of {modality}": part for modality, part in value.items()}
        else:
            states = value if isinstance(value, tuple) else (value,)
            found |= {f"{name} {i}": state for i, state in enumerate(states) if isinstance(state, Tensor)}
    if "input_ids" in batch and found["logits 0"].ndim == 3:
        found["logits 0"] = found["logits 0"][:, : batch["input_ids"].shape[1]]
    loss = found.get("loss 0")
    if loss is None:
        read = [value for name, value in found.items() if name.startswith("logits")] or [found["last_hidden_state 0"]]
        loss = sum((value * torch.linspace(-1, 1, value.numel()).to(value).view_as(value)).sum() for value in read)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found |= {f"gradient of {n}": g for n, g in zip(parameters, grads, strict=True) if g is not None}
    return {name: value.detach() for name, value in found.items()}


def as_double(batch: dict) -> dict:
    """The batch with its numbers in float64."""
    return {
        name: as_double(value) if isinstance(value, dict)
        else value.double() if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in batch.items()
    }  # fmt: skip


def assert_as_exact(exact: dict, stock: dict, ours: dict):
    """Ours errs, against the stock class in float64, not more than the stock class does in float32.

    A rounding at the end of the backward pass reaches every gradient, so that the stock class's greatest error counts.
    """
    assert ours.keys() == stock.keys() and len(ours) > 10
    errors = {}
    for name, right in exact.items():
        scale = right.abs().max().clamp(min=1)
        errors[name] = [((found[name].double() - right).abs().max() / scale).item() for found in (ours, stock)]
    of_gradients = max(allowed for name, (_, allowed) in errors.items() if name.startswith("gradient"))
    for name, (error, allowed) in errors.items():
        allowed = of_gradients if name.startswith("gradient") else allowed
        assert error <= SLACK * allowed + ROUNDING, f"{name} errs by {error:.1e}, the stock class by {allowed:.1e}"
