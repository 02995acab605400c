"""Whole models beside Transformers' class, in several attention implementations."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import sparse_hf
from sparse_hf.bench import cases, models
from sparse_hf.bench.measure import measured

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
# Transformers makes masks for FlexAttention in an older way
MASKS = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
RATIOS = {"forward_times_faster", "step_times_faster", "memory_ratio"}


def other_scale(module, *tensors, scaling, **given):
    return sdpa_attention_forward(module, *tensors, scaling=2 * scaling, **given)


def other_gradient(module, query, *tensors, **given):
    return sdpa_attention_forward(module, query.detach(), *tensors, **given)


def nothing(*tensors, **given):
    out, weights = sdpa_attention_forward(*tensors, **given)
    return out * torch.nan, weights


def refusing(*tensors, **given):
    raise ValueError("a head has 32 numbers; it takes 64\nand more")


def refusing_long(module, query, *tensors, **given):
    if query.shape[2] == 512:
        raise ValueError("takes no 512 tokens")
    return sdpa_attention_forward(module, query, *tensors, **given)


STAND_INS = {f.__name__: f for f in (other_scale, other_gradient, nothing, refusing, refusing_long)}


@pytest.fixture
def beside(monkeypatch):
    """Runs a small Mistral in `implementations`, stand-ins among them."""
    # over all that a session of tests holds it takes a quarter of a second each time
    monkeypatch.setattr("sparse_hf.bench.measure.gc.collect", lambda *generation: 0)
    for name, attend in STAND_INS.items():
        monkeypatch.setitem(AttentionInterface._global_mapping, name, attend)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, sdpa_mask)

    def run(*implementations, lengths=(256, 512), device="cpu", **more):
        small = dataclasses.replace(
            cases.CASES["mistral"],
            config=lambda n, layers: {**cases._mistral(n, layers), **SMALL},
            implementations=implementations,
        )
        monkeypatch.setitem(cases.CASES, "mistral", small)
        return models.run_models(["mistral"], lengths, layers=1, device=device, repeats=1, **more)

    return run


def named(result: dict, name: str) -> list[dict]:
    return [row for row in result["rows"] if row["name"] == f"mistral, {name}"]


def test_models_that_slide_have_a_row_for_each_implementation():
    several = {name: case.implementations for name, case in cases.CASES.items() if len(case.implementations) > 1}
    sinks = dict.fromkeys(("gpt_oss", "gpt_oss_window"), ("eager", "flex_attention"))
    assert several == dict.fromkeys(("modernbert", "mistral"), ("sdpa", "flex_attention")) | sinks
    for name in several:
        config = models._build(cases.CASES[name], 64, 1, torch.float32, torch.device("meta")).config
        assert config._attn_implementation == several[name][0]


def test_bench_times_each_implementation(beside, tmp_path, capsys):
    result = beside("sdpa", "eager", out=tmp_path / "r.json", plot=tmp_path / "r.png")
    assert json.loads((tmp_path / "r.json").read_text()) == result and (tmp_path / "r.png").exists()
    told, names = capsys.readouterr().out, ("sdpa", "eager")
    stock = [f"mistral, transformers ({name})" for name in names]
    assert [row["name"] for row in result["rows"]] == [*stock, "mistral, sparse_hf"] * 2
    assert [row.get("implementation") for row in result["rows"]] == [*names, None] * 2
    assert [row["kind"] for row in result["rows"]] == ["transformers", "transformers", "ours"] * 2
    assert all(row["step_s"] > 0 for row in result["rows"])
    assert max(result["errors"]["mistral"]["eager"].values()) < 1e-4
    for *theirs, ours in (result["rows"][:3], result["rows"][3:]):
        steps = {row["implementation"]: row["step_s"] for row in theirs}
        faster = {name: ratios["step_times_faster"] for name, ratios in ours["beside"].items()}
        assert faster == {name: step / ours["step_s"] for name, step in steps.items()}
        assert ours["fastest"] == min(steps, key=steps.get) and f"by {ours['fastest']} *" in told
        assert ours["beside"]["sdpa"] == {key: ours[key] for key in RATIOS}
    assert [told.count(f"  by {name}") for name in names] == [2, 2] and told.count(" *") == 2


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("other_scale", "wrong: output is off by "),
        ("other_gradient", "wrong: gradient is off by "),
        ("nothing", "wrong: output is off by nan, Transformers' default in fp32 by 0.0e+00"),
        ("refusing", "ValueError: a head has 32 numbers; it takes 64"),
        ("no_such_implementation", 'ValueError: Specified `attn_implementation="no_such_implementation"`'),
        ("flex_attention", "not run: PyTorch's FlexAttention has no backward on CPUs; without training it runs"),
    ],
)
def test_bench_does_not_time_what_is_wrong_or_refuses(beside, other, reason):
    result = beside("sdpa", other)
    rows = named(result, f"transformers ({other})")
    assert all(row["failed"].startswith(reason) and "\n" not in row["failed"] for row in rows)
    assert (
        all(set(row) == {"model", "name", "kind", "implementation", "n", "failed"} for row in rows) and len(rows) == 2
    )
    assert result["errors"]["mistral"][other] == {"failed": rows[0]["failed"]}
    for ours in named(result, "sparse_hf"):
        assert set(ours["beside"]) == {"sdpa"} and ours["fastest"] == "sdpa" and ours["step_times_faster"] > 0


NARROW = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
ENCODER = {"d_model": 64, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
OSS = {**NARROW, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 64}


@pytest.mark.parametrize(
    ("name", "small", "n", "layers"),
    [("vit", NARROW, 197, 2), ("whisper", ENCODER, 700, 2), ("gpt_oss", OSS, 300, 2), ("gpt_oss_window", OSS, 300, 1)],
)
def test_bench_compares_pictures_sounds_and_sinks(monkeypatch, name, small, n, layers):
    monkeypatch.setattr("sparse_hf.bench.measure.gc.collect", lambda *generation: 0)
    case = cases.CASES[name]
    less = dataclasses.replace(
        case, config=lambda n, layers: {**case.config(n, layers), **small}, implementations=case.implementations[:1]
    )
    monkeypatch.setitem(cases.CASES, name, less)
    result = models.run_models([name], [n], layers=layers, device="cpu", repeats=1)
    assert all(row["step_s"] > 0 for row in result["rows"]) and len(result["rows"]) == 2
    assert 0 < max(result["errors"][name].values()) < 1e-4
    # the mask that a class was given is gone
    assert "sdpa" not in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_mask_that_a_class_does_not_take_counts(monkeypatch):
    wrong = dataclasses.replace(cases.CASES["vit"], dense=False, compared=197)
    wrong = dataclasses.replace(wrong, config=lambda n, layers: {**cases._vit(n, layers), **NARROW})
    monkeypatch.setitem(cases.CASES, "vit", wrong)
    with pytest.raises(AssertionError, match="ViTModel: output is off by"):
        models.run_models(["vit"], [197], layers=1, device="cpu")


def test_bench_refuses_a_picture_that_is_not_square():
    with pytest.raises(ValueError, match="lengths has 300; a square picture is side"):
        cases.CASES["vit"].pattern_of(300)


def test_bench_compares_what_is_compiled_and_takes_the_faster_of_theirs(beside, monkeypatch):
    class Other(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.parameters = model, model.parameters

        def forward(self, **inputs):
            return [2 * self.model(**inputs)[0]]

    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    result = beside("sdpa", lengths=(256,), compile_mode="default")
    eager, compiled, ours = result["rows"]
    names = ["transformers (sdpa)", "transformers (sdpa), compiled", "sparse_hf, compiled"]
    assert [row["name"] for row in result["rows"]] == [f"mistral, {name}" for name in names]
    assert [row["compile_mode"] for row in result["rows"]] == [None, "default", "default"] == [None, *modes]
    assert (
        "against_uncompiled" not in eager and max(*compiled["against_uncompiled"], *ours["against_uncompiled"]) < 1e-4
    )
    assert ours["step_times_faster"] == min(eager["step_s"], compiled["step_s"]) / ours["step_s"]
    # what a compiler gets wrong is not timed; of ours it ends the run
    monkeypatch.setattr(
        torch, "compile", lambda model, mode: model if "Sparse" in type(model).__name__ else Other(model)
    )
    result = beside("sdpa", lengths=(256,), compile_mode="default")
    assert "compiled, n = 256, in mode default: output is off by 1.0e+00" in result["rows"][1]["failed"]
    assert result["rows"][2]["step_times_faster"] > 0
    monkeypatch.setattr(torch, "compile", lambda model, mode: Other(model))
    with pytest.raises(AssertionError, match="mistral, sparse_hf, compiled, n = 256, in mode default: output is off"):
        beside("sdpa", lengths=(256,), compile_mode="default")


def test_bench_checkpoints_where_a_class_supports_it(beside, monkeypatch):
    kept = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lambda *a, **k: kept.append(1) or checkpoint(*a, **k))
    monkeypatch.setattr(transformers.MistralModel, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(sparse_hf.SparseMistralModel, "supports_gradient_checkpointing", True)
    rows = beside("sdpa", lengths=(256,), checkpointing=True)["rows"]
    assert [row["checkpointing"] for row in rows] == [False, True] and kept


def test_bench_goes_on_where_another_implementation_refuses_a_length(beside):
    result = beside("sdpa", "refusing_long", training=False)
    short, long = named(result, "transformers (refusing_long)")
    assert short["forward_s"] > 0 and long["failed"] == "ValueError: takes no 512 tokens"
    assert [set(row["beside"]) for row in named(result, "sparse_hf")] == [{"sdpa", "refusing_long"}, {"sdpa"}]
    # what does not train is compared without a gradient
    assert set(result["errors"]["mistral"]["refusing_long"]) == {"output"}


def test_bench_has_no_names_of_implementations_where_there_is_one(beside):
    result = beside(None, lengths=[256], training=False)
    assert [row["name"] for row in result["rows"]] == ["mistral, transformers", "mistral, sparse_hf"]
    assert not any({"implementation", "beside", "fastest"} & set(row) for row in result["rows"])
    assert result["rows"][1]["forward_times_faster"] > 0


def test_ratios_where_the_default_does_not_fit():
    figures = {"model": "m", "n": 8, "forward_s": 2.0, "step_s": None, "peak_bytes": 4}
    row = {"model": "m", "n": 8, "kind": "transformers"}
    failed, timed = (
        {**row, "implementation": "sdpa", "failed": "out of memory"},
        {**row, "implementation": "flex_attention"},
    )
    ours = {**figures, "kind": "ours", "forward_s": 1.0}
    models._add_ratios([failed, {**timed, **figures}, ours])
    beside = {"forward_times_faster": 2.0, "step_times_faster": None, "memory_ratio": 1.0}
    assert {key: ours[key] for key in RATIOS} == dict.fromkeys(RATIOS)
    assert (ours["beside"], ours["fastest"]) == ({"flex_attention": beside}, "flex_attention")


def test_measured_lets_other_errors_through():
    def work():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        measured({}, work)
    assert measured({}, work, (RuntimeError,)) == {"failed": "RuntimeError: something else"}


@MASKS
@pytest.mark.slow
def test_flex_attention_runs_on_cpus_without_training(beside):
    result = beside("sdpa", "flex_attention", training=False)
    assert all(row["forward_s"] > 0 for row in named(result, "transformers (flex_attention)"))
    assert result["errors"]["mistral"]["flex_attention"]["output"] < 1e-4


@MASKS
@pytest.mark.gpu
def test_flex_attention_trains_on_gpus(beside):
    result = beside("sdpa", "flex_attention", device="cuda")
    assert all(row["step_s"] > 0 for row in named(result, "transformers (flex_attention)"))
    assert result["errors"]["mistral"]["flex_attention"]["gradient"] < 1e-4
