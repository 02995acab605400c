"""A window that narrows: what each step sees, and what is left when it is over."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import sparse_hf
from sparse_hf.train import NarrowingWindow, heal
from tests.models.families import dense_model
from tests.train.test_heal import arguments, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PATTERN = "window(3, 3) | first(1)"


def seen(model, patterns):
    """Has each training pass of the model write its patterns down."""

    def look(module, *_):
        if module.training:
            patterns.append(module.config.layer_patterns(""))

    model.register_forward_pre_hook(look)


def test_each_step_has_its_window(tmp_path):
    model = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), PATTERN, "0=dense")
    patterns = []
    seen(model, patterns)
    changes = {
        "max_steps": 5,
        "learning_rate": 0.01,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    }
    args = arguments(tmp_path, **changes)
    args.save_strategy, args.save_steps = "steps", 1
    heal(model, rows(), args, eval_dataset=rows(), callbacks=[NarrowingWindow((20, 8), steps=4)])
    own = "window(3, 3) | first(1)"
    # two batches a step, two steps a window, and the pattern alone behind them
    assert [layers[1] for layers in patterns] == [f"{own} | window(20, 20)"] * 4 + [f"{own} | window(8, 8)"] * 4 + [
        own
    ] * 2
    assert {layers[0] for layers in patterns} == {"window(None, None)"}
    assert model.config.layer_patterns("") == ["window(None, None)", own]
    # what is saved on the way has the pattern that the model will be used with
    saved = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["sparse_attention"]["patterns"]
    assert saved == {"sparse": own, "dense": "window(None, None)"}


def test_a_window_of_everything_trains_as_dense_does(tmp_path):
    weights = []
    for pattern, callbacks in (("window(None, None)", []), (PATTERN, [NarrowingWindow((100,), steps=1)])):
        model = sparse_hf.sparsify(copy.deepcopy(dense_model("LlamaForCausalLM")), pattern)
        heal(model, rows(), arguments(tmp_path, learning_rate=0.1), callbacks=callbacks)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_heads_widen_by_themselves(tmp_path):
    model = sparse_hf.sparsify(
        dense_model("LlamaForCausalLM"), "per_head(window(2, 0), window(4, 0), window(2, 0), window(4, 0))"
    )
    patterns = []
    seen(model, patterns)
    heal(model, rows(), arguments(tmp_path), callbacks=[NarrowingWindow((9,), steps=1)])
    assert patterns[0][0].count("window(9, 9)") == 4


@pytest.mark.parametrize(
    ("windows", "steps", "message"),
    [((), 4, "windows is"), ((4, 8), 4, "windows is"), ((8, 4), 1, "steps is 1"), ((-1,), 4, "windows is")],
)
def test_bad_input(windows, steps, message):
    with pytest.raises(ValueError, match=message):
        NarrowingWindow(windows, steps)


def test_a_dense_model_is_refused(tmp_path):
    from transformers import Trainer

    with pytest.raises(ValueError, match="LlamaForCausalLM is not sparse"):
        Trainer(dense_model("LlamaForCausalLM"), arguments(tmp_path), train_dataset=rows(),
                callbacks=[NarrowingWindow((4,), steps=1)]).train()  # fmt: skip
