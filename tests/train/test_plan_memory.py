"""What `plan_memory` works out is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import sparse_hf
from sparse_hf.bench.training import shape_config
from sparse_hf.cli import app
from sparse_hf.train import plan_memory

RESULTS = Path(__file__).parents[2] / "docs" / "results"
# of what was measured
TOLERANCE = 0.15


def measured() -> list:
    """Rows of training steps without an optimizer, by tokens and way, and bytes that were held."""
    found = []
    for path in sorted(RESULTS.glob("*/*-memory*.json")):
        content = json.loads(path.read_text())
        for row in content["rows"] if content.get("benchmark") == "memory" else []:
            if row.get("peak_bytes"):
                how = {"way": row["way"], "dtype": {"bf16": torch.bfloat16, "fp32": torch.float32}[content["dtype"]]}
                name = f"{path.parent.name}-{row['name']}-{row['n']}"
                found.append(pytest.param(row["shape"], row["n"], how, row["peak_bytes"], id=name))
    return found


@pytest.mark.parametrize(("shape", "length", "how", "peak"), measured())
def test_a_plan_is_what_was_measured(shape, length, how, peak):
    plan = plan_memory(shape_config(shape, 1 << 21 if shape == "1b" else length), length, optimizer="none", **how)
    assert plan.peak == pytest.approx(peak, rel=TOLERANCE)
    assert sum(plan.parts.values()) == plan.peak


def test_a_model_is_read_as_its_configuration():
    config = shape_config("tiny", 4096)
    dense = transformers.LlamaForCausalLM(config)
    plans = [plan_memory(given, 2048) for given in (config, dense, sparse_hf.sparsify(dense, "window(15, 0)"))]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "RobertaForMaskedLM", "Qwen3ForCausalLM", "ModernBertForMaskedLM"])
def test_other_families_are_read(head):
    config = getattr(transformers, head).config_class()
    config.architectures = [head]
    short, long = (plan_memory(config, n).peak for n in (1 << 16, 1 << 20))
    assert short < long < 16 * short
    assert (
        plan_memory(config, 1 << 20, way="checkpointing").peak > long > plan_memory(config, 1 << 20, way="offload").peak
    )


def test_processes_share_a_text_and_weights():
    config = shape_config("1b", 1 << 20)
    alone, split, both = (
        plan_memory(config, 1 << 20, **how)
        for how in ({}, {"gpus": 4, "split": True}, {"gpus": 4, "split": True, "fsdp": True})
    )
    assert split.tokens == both.tokens == 1 << 18 and alone.peak > split.peak > both.peak
    assert split.parts["inputs of layers"] * 4 == alone.parts["inputs of layers"]
    assert both.parts["optimizer"] * 4 == split.parts["optimizer"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"rows": 0}, "rows is 0"),
        ({"way": "fast"}, "way is 'fast'; the known ones are plain"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"split": True}, "take several processes, and gpus is 1"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_steps_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(shape_config("tiny", 64), **{"length": 64, **given})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "head over its vocabulary"),
        (transformers.ViTConfig(), "head over its vocabulary"),
        (
            transformers.MixtralConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
            ),
            "mixtures of experts have to be measured",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_read(config, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(config, 64)


def test_the_command(tmp_path):
    shape_config("tiny", 4096).save_pretrained(tmp_path)
    given = ["plan-memory", str(tmp_path), "--length", "4096", "--gpus", "4"]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0 and "one text, FSDP2, on each of 4 GPUs" in done.stdout
    assert done.stdout.startswith(f"{tmp_path.name}: a training step, 1 x 4,096 tokens, bf16, optimizer adamw\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    plans = json.loads(CliRunner().invoke(app, [*given, "--json"], catch_exceptions=False).stdout)
    assert len(plans) == 12 and all(sum(plan["parts"].values()) == plan["peak"] for plan in plans)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        CliRunner().invoke(app, [*given, "--dtype", "int8"], catch_exceptions=False)
