"""The examples on two GPUs give the losses of one process.

They are launched by the configurations in examples/accelerate.

Run with `python -m pytest -q -m gpu tests/train/test_gpus.py`: a dozen launches of half a minute
each, 18 with deepspeed.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparse_hf  # noqa: F401
from tests.processes import finished

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    *(
        pytest.mark.skipif(find_spec(name) is None, reason=f"the examples need {name}")
        for name in ("accelerate", "datasets")
    ),
]
FOLDER = Path(__file__).parents[2] / "examples"
# the tiny texts make 21 rows, and a batch that lacks some would be filled up on two GPUs
ROWS, STEPS = 4, 5
ZERO3 = pytest.param("zero3", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed"))


def run(name: str, out: Path, processes: int, config: str | None, *options: str) -> None:
    """One example with `ROWS` rows a step, on as many GPUs as processes, in float32."""
    launch = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--main_process_port", "0"]
    launch += ["--config_file", str(FOLDER / "accelerate" / f"{config}.yaml")] if config else ["--num_machines", "1"]
    rows = str(ROWS // processes)
    status, said = finished(
        *launch, "--num_processes", str(processes), str(FOLDER / f"{name}.py"), "--tiny", "--output_dir", str(out),
        "--per_device_train_batch_size", rows, "--max_steps", str(STEPS), "--logging_steps", "1", "--learning_rate", "1e-3",
        "--disable_tqdm", "True", "--save_steps", "3", *options,
    )  # fmt: skip
    assert status == 0, said[-6000:]


def losses(out: Path) -> list[float]:
    if (out / "losses.json").exists():
        return list(json.loads((out / "losses.json").read_text()).values())
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of runs of one process, each made once."""
    made = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", "0")
                run(name, made[name], 1, None)
        return made[name]

    return of


def weights(out: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "sparse_llama"
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.parametrize("config", ["ddp", "fsdp2", ZERO3])
@pytest.mark.parametrize("name", ["run_clm", "run_clm_no_trainer"])
def test_two_gpus_do_what_one_does(name, config, alone, tmp_path):
    run(name, tmp_path, 2, config)
    expected = losses(alone(name))
    assert len(expected) == STEPS
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    right = weights(alone(name))
    assert (weights(tmp_path) - right).norm() < 1e-3 * right.norm()
    # a run that goes on from a checkpoint of parts
    run(name, tmp_path, 2, config, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("config", ["ddp", "fsdp2", ZERO3])
def test_healing_on_two_gpus_saves_the_whole_model(config, tmp_path):
    # a teacher is refused under ZeRO-3
    run("heal", tmp_path, 2, config, *([] if config == "zero3" else ["--distil"]))
    said = json.loads((tmp_path / "healing.json").read_text())
    assert said["after_perplexity"] < said["before_perplexity"]
    assert len(weights(tmp_path))
