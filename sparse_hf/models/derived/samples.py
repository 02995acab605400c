"""Inputs for a tiny model: a text, an image, a video or a sound, whichever its `forward` takes.

Legend: B batch (2 rows), N tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS, TOKENS = 2, 24
# ids below are special in many vocabularies
FIRST_ID = 5


def sample_inputs(model: PreTrainedModel) -> tuple[dict[str, Any], Any]:
    """Arguments of `forward` that a tiny model takes, and what it answers.

    Raises:
        ValueError: none of those that are tried; the message says what the last one met.
    """
    problem = None
    for inputs in _candidates(model):
        try:
            with torch.no_grad():
                return inputs, model(**fresh(inputs))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
            # the first candidates are the likeliest, but for those that lack an argument
            if problem is None or "missing" in problem and "missing" not in str(error):
                problem = f"{type(error).__name__}: {error}"
    problem = problem or "its forward has no input that is known"
    raise ValueError(f"no sample fits {type(model).__name__} ({' '.join(problem.split())[:200]})")


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, copied: some classes add to what they are given."""
    return {name: given.clone() if isinstance(given, Tensor) else given for name, given in inputs.items()}


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    names = set(inspect.signature(model.forward).parameters)
    common = {"use_cache": False} if "use_cache" in names else {}
    if "input_ids" in names and model.main_input_name in ("input_ids", "inputs_embeds"):
        # some tables of positions are shorter than the first text
        for tokens in (TOKENS, TOKENS // 2):
            yield from ({**text, **common} for text in _texts(model.config, names, tokens))
    for name, make in (
        ("pixel_values", _images),
        ("pixel_values_videos", _videos),
        ("input_values", _sounds),
        ("input_features", _features),
        ("hidden_states", _patches),
        ("inputs_embeds", _states),
    ):
        if name in names:
            yield from ({name: tensor, **more, **common} for tensor, more in make(model, names))
    if "input_ids" in names:
        yield from ({**text, **common} for text in _texts(model.config, names, TOKENS))


def token_ids(config: Any, tokens: int = TOKENS) -> Tensor:
    """`[B, N]`, none of them special."""
    special = {v for k, v in vars(config).items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    size = getattr(config, "vocab_size", None) or getattr(config, "text_vocab_size", None) or 64
    free = [i for i in range(FIRST_ID, size) if i not in special]
    return torch.tensor(free)[torch.randint(len(free), (ROWS, tokens))]


def _texts(config: Any, names: set[str], tokens: int) -> Iterator[dict[str, Tensor]]:
    ids = token_ids(config, tokens)
    more = {"decoder_input_ids": token_ids(config, tokens)} if "decoder_input_ids" in names else {}
    yield {"input_ids": ids, **more}
    # of images in a document, boxes of words
    if "bbox" in names:
        yield {"input_ids": ids, "bbox": torch.zeros(ROWS, tokens, 4, dtype=torch.long), **more}
    width = getattr(config, "hidden_size", None)
    if "encoder_hidden_states" in names and isinstance(width, int):
        yield {"input_ids": ids, "encoder_hidden_states": torch.randn(ROWS, tokens, width), **more}


def _sides(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(config, "input_size", None) or 64
    return (size, size) if isinstance(size, int) else tuple(size)[:2]


def _images(model: PreTrainedModel, names: set[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    config: Any = model.config
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
    height, width = _sides(config)
    yield torch.randn(ROWS, channels, height, width), {}
    yield torch.randn(ROWS, getattr(config, "num_frames", 4), channels, height, width), {}
    # patches in a row, with the size of the grid that they come from
    patch = getattr(config, "patch_size", 16)
    if isinstance(patch, int):
        flat = torch.randn(1, 64, channels * patch * patch)
        yield (
            flat,
            {"spatial_shapes": torch.tensor([[8, 8]]), "pixel_attention_mask": torch.ones(1, 64, dtype=torch.long)},
        )
        yield flat, {"attention_mask": torch.ones(1, 64, dtype=torch.long), "spatial_shapes": torch.tensor([[8, 8]])}
        grid = next((name for name in ("grid_thw", "image_grid_thw", "target_sizes") if name in names), "grid_thw")
        # rows of numbers, or small images
        for patches in (flat[0], torch.randn(64, channels, patch, patch)):
            merged = {"merge_sizes": torch.tensor([1])} if "merge_sizes" in names else {}
            yield patches, {grid: torch.tensor([[1, 8, 8]]), **merged}


def _videos(model: PreTrainedModel, names: set[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    config: Any = model.config
    height, width = _sides(config)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 4)
    yield (
        torch.randn(1, frames, getattr(config, "num_channels", None) or getattr(config, "in_chans", 3), height, width),
        {},
    )


def _patches(model: PreTrainedModel, names: set[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Patches `[N, channels * pixels]` of an image of 8 x 8, as vision towers of language models take them."""
    config: Any = model.config
    size, merged = getattr(config, "patch_size", 14), torch.tensor([[1, 8, 8]])
    channels = (
        getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or getattr(config, "num_channels", 3)
    )
    for frames in (getattr(config, "temporal_patch_size", 1), 1):
        yield torch.randn(64, channels * frames * size * size), {"grid_thw": merged}
    yield from _states(model, names)


def _sounds(model: PreTrainedModel, names: set[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    config: Any = model.config
    bins = getattr(config, "num_mel_bins", None)
    if isinstance(bins, int) and isinstance(getattr(config, "max_length", None), int):
        yield torch.randn(ROWS, config.max_length, bins), {}
    step = 1
    for stride in getattr(config, "conv_stride", None) or (320,):
        step *= stride
    yield torch.randn(ROWS, step * 40 + 400), {}
    yield torch.randn(ROWS, 1, step * 40), {}


def _features(model: PreTrainedModel, names: set[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    config: Any = model.config
    sizes = (
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "input_size",
        "feature_projection_input_dim",
        "input_dim",
    )
    widths = {v for name in sizes if isinstance(v := getattr(config, name, None), int)} or {80}
    frames = getattr(config, "max_source_positions", None)
    more = {"decoder_input_ids": token_ids(config)} if "decoder_input_ids" in names else {}
    for width in widths:
        if isinstance(frames, int):
            yield torch.randn(ROWS, width, 2 * frames), more
        if "feature_lens" in names:
            # several sounds one behind the other
            yield torch.randn(width, 160), {"feature_lens": torch.tensor([100, 60]), **more}
        if "input_features_mask" in names:
            yield (
                torch.randn(ROWS, width, 192),
                {"input_features_mask": torch.ones(ROWS, 192, dtype=torch.long), **more},
            )
            yield (
                torch.randn(ROWS, 192, width),
                {"input_features_mask": torch.ones(ROWS, 192, dtype=torch.long), **more},
            )
        for length in (192, 64, 160):
            yield torch.randn(ROWS, length, width), more
            yield (
                torch.randn(ROWS, length, width),
                {"attention_mask": torch.ones(ROWS, length, dtype=torch.long), **more},
            )
            yield torch.randn(ROWS, width, length), more


def _states(model: PreTrainedModel, names: set[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    width = getattr(model.config, "hidden_size", None) or getattr(model.config, "d_model", None)
    if isinstance(width, int):
        yield torch.randn(ROWS, TOKENS, width), {}
        yield torch.randn(ROWS, TOKENS, width), {"attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long)}
