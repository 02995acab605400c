"""Models of images with `window2d`, beside Transformers' classes under the same pairs as an explicit mask."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AttentionInterface

import sparse_hf

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
# class -> its configuration, and how many tokens stand in front of the patches
MODELS = {
    "ViTModel": ({**SIZES, "image_size": (24, 40)}, 1),
    "DeiTModel": ({**SIZES, "image_size": 28}, 2),
    "Dinov2Model": ({**SIZES, "image_size": 28}, 1),
    "Dinov2WithRegistersModel": ({**SIZES, "image_size": 28, "num_register_tokens": 4}, 5),
    "SiglipVisionModel": ({**SIZES, "image_size": 28}, 0),
}
HELD: list[torch.Tensor] = []


def under_mask(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, HELD[0], scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("under_mask", under_mask)


def near(rows: int, columns: int, radius: int, front: int) -> torch.Tensor:
    """Pairs of patches by their places, one after another, with tokens in front that see all and are seen by all."""
    places = [(r, c) for r in range(rows) for c in range(columns)]
    held = torch.zeros(front + len(places), front + len(places), dtype=torch.bool)
    held[:front], held[:, :front] = True, True
    for i, (row, column) in enumerate(places):
        for j, (other, another) in enumerate(places):
            held[front + i, front + j] = abs(row - other) <= radius and abs(column - another) <= radius
    return held


@pytest.mark.parametrize("name", MODELS)
def test_a_window_over_patches_is_that_mask(name):
    fields, front = MODELS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    dense = kind(kind.config_class(**fields)).eval()
    for weight in dense.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight[0].numel() ** -0.5)
    size = fields["image_size"] if isinstance(fields["image_size"], tuple) else (fields["image_size"],) * 2
    rows, columns = (side // 4 for side in size)
    pattern = f"window2d({rows}, {columns}, 1, offset={front})" + f" | first({front})" * bool(front)
    sparse = sparse_hf.sparsify(dense, pattern)
    pixels = torch.randn(2, 3, *size)
    HELD[:] = [near(rows, columns, 1, front)]
    whole = dense(pixels).last_hidden_state
    dense.set_attn_implementation("under_mask")
    answers = [model(pixels).last_hidden_state for model in (dense, sparse)]
    torch.testing.assert_close(answers[1], answers[0], atol=1e-5, rtol=1e-5)
    assert (answers[0] - whole).abs().max() > 1e-2
    learned = tuple(p for p in dense.parameters() if p.requires_grad)
    wanted, found = (torch.autograd.grad(answer.sin().sum(), learned, allow_unused=True) for answer in answers)
    for one, other in zip(wanted, found, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1), "window2d: height is 0; it must be a whole number of at least 1"),
        ((4, 4, -1), "window2d: radius is -1"),
        ((4, 4, 1, -2), "window2d: offset is -2"),
    ],
)
def test_bad_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse_hf.Window2d(*arguments)


def test_blocks_of_a_large_image_are_few():
    """At 128 x 128 patches a query of radius 8 sees 289 of 16,384 keys; blocks that are counted hold a few times as many."""
    plan = sparse_hf.build_plan("window2d(128, 128, 8)", 128 * 128, block_size=64)
    assert len(plan.columns) * 64 * 64 < 16_384 * 289 * 9
