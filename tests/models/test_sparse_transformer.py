"""Sparse Transformer (arXiv:1904.10509): its two patterns by layers and by heads, what they reach, and what models compute."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import sparse_hf
from sparse_hf import Pattern, PerHead, recipes
from sparse_hf.analysis.reach import reach
from sparse_hf.analysis.show import describe_stack
from sparse_hf.cli import app
from sparse_hf.models import parse_layers
from sparse_hf.plan import build_plan
from tests import oracle
from tests.models.families import additive, dense_model, inputs
from tests.table import PATTERNS, causal_form

MODES = ["strided", "fixed"]
HEADS = ["GPT2LMHeadModel", "LlamaForCausalLM"]
# lengths with the root as stride, and the paper's longest text (enwik8, section 6.2) with its stride and summaries
SIZES = [(1, 1), (2, 2), (9, 3), (100, 10), (257, 16), (1000, 32), (3000, 64)]
LONG = pytest.param(12_288, 128, marks=pytest.mark.slow)


@pytest.mark.cross
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("length", "stride"), [*SIZES, LONG])
def test_two_layers_reach_every_earlier_token_and_one_does_not(length, stride, mode):
    shape = {"stride": stride, "mode": mode, "summary": max(1, min(8, stride // 2))}
    near, far = recipes.sparse_transformer_layers(2, **shape)
    found = describe_stack([near, far], length)
    assert (found.layers, found.looks_ahead, found.unit) == (2 if length > 2 else 1, False, 1)
    # heads side by side, and both patterns in one, in every layer
    heads = recipes.sparse_transformer_heads(2, **shape)
    assert describe_stack([heads], length).layers == found.layers
    assert describe_stack([recipes.sparse_transformer(**shape)], length).layers == found.layers
    if length > 9:
        assert all(describe_stack([one], length).layers not in (1, 2) for one in (near, far))


def test_fixed_reaches_nothing_the_other_way_round():
    near, far = recipes.sparse_transformer_layers(2, 16, "fixed")
    assert describe_stack([near, far], 200).layers == 2 and describe_stack([far, near], 200).layers == 3
    near, far = recipes.sparse_transformer_layers(2, 16, "strided")
    assert describe_stack([far, near], 200).layers == 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", PATTERNS[::2])
def test_reach_equals_products_of_matrices(first, causal):
    length, stack = 150, [first, "window(3, 1)", "chunk(16)"]
    stack = [causal_form(text) if causal else text for text in stack]
    steps = [oracle.dense_mask(text, length, length)[0].any(0) for text in stack]
    wanted = torch.ones(length, length, dtype=torch.bool)
    wanted = wanted if any(step.triu(1).any() for step in steps) else wanted.tril()
    heard, layers = torch.eye(length, dtype=torch.bool), None
    for number in range(300):
        heard = heard | (steps[number % 3].float() @ heard.float() > 0)
        if (heard | ~wanted).all():
            layers = number + 1
            break
    assert reach([build_plan(text, length, block_size=32) for text in stack]).layers == layers


def test_long_texts_are_seen_block_by_block():
    found = describe_stack(recipes.sparse_transformer_layers(2, 256), 40_000)
    assert found.layers is not None and found.layers <= 2 and found.unit == 128
    assert describe_stack(["chunk(128)", "window(0, 0)"], 40_000).layers is None
    assert describe_stack(["window(1, 0)"], 1500).is_beyond


def masks(head: str, patterns: list[Pattern], real: torch.Tensor) -> list[torch.Tensor]:
    length = real.shape[1]
    return [oracle.dense_mask(str(pattern), length, length, real.bool()) for pattern in patterns]


def dense_with(head: str, patterns: list[Pattern], batch: dict) -> dict[str, torch.Tensor]:
    """Loss, logits and gradients of the dense model whose layers add a mask each, head by head."""
    dense = dense_model(head)
    dense.set_attn_implementation("eager")
    blocks = dense.transformer.h if "GPT2" in head else dense.model.layers

    def adding(mask):
        def hook(_, args, kwargs):
            return args, {**kwargs, "attention_mask": additive(mask)}

        return hook

    for block, mask in zip(blocks, masks(head, patterns, batch["attention_mask"]), strict=True):
        attention = block.attn if "GPT2" in head else block.self_attn
        attention.register_forward_pre_hook(adding(mask), with_kwargs=True)
    return answers(dense, batch)


def answers(model, batch: dict) -> dict[str, torch.Tensor]:
    outputs = model(**batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(outputs.loss, parameters)
    real = batch["attention_mask"].bool()
    return {"loss": outputs.loss, "logits": outputs.logits[real], **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("form", ["layers", "heads", "merged"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", HEADS)
def test_models_equal_dense_ones_with_the_same_masks(head, mode, form):
    shape = {"stride": 12, "mode": mode, "summary": 3}
    one = recipes.sparse_transformer_heads(4, **shape) if form == "heads" else recipes.sparse_transformer(**shape)
    stack = recipes.sparse_transformer_layers(2, **shape) if form == "layers" else [one, one]
    batch = inputs(head, "right")
    sparse = sparse_hf.sparsify(dense_model(head), one, layers=stack)
    found = answers(sparse, batch)
    for name, wanted in dense_with(head, stack, batch).items():
        torch.testing.assert_close(found[name], wanted, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_layers_take_turns_by_text():
    text = "0-/2=sparse_transformer(12, part=1), 1-/2=sparse_transformer(12, part=2)"
    assert parse_layers(text, 5, "first(1)") == recipes.sparse_transformer_layers(5, 12)
    found = parse_layers("1-6/3=dense", 8, "first(1)")
    assert [str(p) == "window(None, None)" for p in found] == [i in (1, 4) for i in range(8)]
    with pytest.raises(ValueError, match="'0-/0' is not a layer or a range"):
        parse_layers({"0-/0": "dense"}, 4, "first(1)")
    with pytest.raises(ValueError, match="part is 3; it must be 1"):
        recipes.sparse_transformer(part=3)
    assert isinstance(Pattern.parse("sparse_transformer_heads(4, 12, 'fixed')"), PerHead)


def test_show_takes_a_stack():
    shown = CliRunner().invoke(app, ["show", "chunk(8) & causal()", "summary(8, 1) | window(0, 0)", "--length", "200"])
    assert shown.exit_code == 0 and "in turn" in shown.stdout
    halves = [f"sparse_transformer(16, 'fixed', 2, part={part})" for part in (1, 2)]
    shown = CliRunner().invoke(app, ["show", *halves, "--length", "1000"]).stdout.replace("\n", "")
    assert "in turn: 2, to every earlier token" in shown and shown.count("never") == 2
