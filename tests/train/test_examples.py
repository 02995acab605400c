"""The training examples run with `--tiny`, and one that was killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COMMON = ["--tiny", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def run(name: str, out: Path, *options: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([*COMMON, "--output_dir", str(out), *options])


def losses(out: Path) -> dict[int, float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.parametrize("name", ["run_clm", "run_mlm"])
def test_language_models_learn(name, tmp_path):
    metrics = run(name, tmp_path, "--max_steps", "20", "--learning_rate", "3e-3", "--save_strategy", "no")
    found = losses(tmp_path)
    assert len(found) == 20 and found[20] < found[1] - 0.5
    assert metrics["perplexity"] < 300
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("sparse_")


def test_classification_learns_with_marked_headers(tmp_path):
    options = ["--max_steps", "60", "--learning_rate", "3e-3", "--headers", r"^Article \d+$", "--save_strategy", "no"]
    metrics = run("run_classification", tmp_path, *options)
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_f1"] == 1.0


def test_a_file_of_texts_is_read_and_streamed(tmp_path):
    from examples import tiny

    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps(example) for example in tiny.texts(30)))
    run("run_clm", tmp_path / "first", "--max_steps", "1", "--save_strategy", "no")
    options = ["--tiny", "False", "--model_name_or_path", str(tmp_path / "first"), "--max_length", "128"]
    options += ["--train_file", str(file), "--validation_file", str(file), "--streaming", "--save_strategy", "no"]
    metrics = run("run_clm", tmp_path / "second", *options, "--max_steps", "2")
    assert metrics["perplexity"] > 1 and not (tmp_path / "second" / "converted").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("run_clm", ["--tiny", "False"], "model_name_or_path is missing"),
        ("run_clm", ["--streaming"], "say --max_steps"),
        ("run_clm", ["--dataset_name", "a", "--train_file", "b"], "give one"),
        ("run_clm", ["--resume_from_checkpoint", "nowhere"], "is no folder"),
        ("run_clm", ["--text_column", "body"], "--text_column is 'body'; the data set has text, label"),
    ],
)
def test_mistakes_are_told(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(name, tmp_path, *options)


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from examples import run_clm

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

def trainer(*args, **kwargs):
    return Trainer(*args, **kwargs, callbacks=[Kill()])

Trainer, run_clm.Trainer = run_clm.Trainer, trainer
run_clm.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    options = [
        "--max_steps",
        "8",
        "--save_steps",
        "3",
        "--save_total_limit",
        "9",
        "--learning_rate",
        "3e-3",
        "--per_device_train_batch_size",
        "2",
    ]
    run("run_clm", tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, *COMMON, "--output_dir", str(killed), *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (killed / "checkpoint-3").is_dir() and not (killed / "trainer_state.json").exists()
    before = time.time()
    run("run_clm", killed, *options, "--resume_from_checkpoint", "True")
    # what came before was not done again
    assert (killed / "checkpoint-3" / "model.safetensors").stat().st_mtime < before
    assert losses(killed) == losses(tmp_path / "whole")
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("options", [["--distil", "--edges", "32"], ["--lora_rank", "4"]], ids=["distil", "lora"])
def test_healing_heals(options, tmp_path):
    metrics = run("heal", tmp_path, *options, "--max_steps", "20", "--learning_rate", "3e-3", "--save_strategy", "no")
    assert metrics["after_perplexity"] < metrics["before_perplexity"] - 20
    assert ("after_perplexity_0-31" in metrics) == ("--edges" in options)
    run("run_clm", tmp_path / "next", "--tiny", "False", "--model_name_or_path", str(tmp_path), "--do_eval", "--max_length", "64",
        "--train_file", _file(tmp_path))  # fmt: skip


def _file(folder: Path) -> str:
    from examples import tiny

    (folder / "texts.jsonl").write_text("\n".join(json.dumps(example) for example in tiny.texts(30)))
    return str(folder / "texts.jsonl")


@pytest.mark.parametrize("name", ["run_clm_no_trainer", "run_mlm_no_trainer"])
def test_the_plain_loop_learns_and_goes_on(name, tmp_path):
    options = ["--max_steps", "8", "--save_steps", "3", "--learning_rate", "3e-3", "--per_device_train_batch_size", "2"]
    options += ["--gradient_accumulation_steps", "2"]
    perplexity = run(name, tmp_path / "whole", *options)
    found = json.loads((tmp_path / "whole" / "losses.json").read_text())
    assert len(found) == 8 and found["8"] < found["1"] - 0.1
    again = tmp_path / "whole" / "checkpoint-3"
    resumed = run(name, tmp_path / "on", *options, "--resume_from_checkpoint", str(again))
    losses = json.loads((tmp_path / "on" / "losses.json").read_text())
    assert len(losses) == 8 and [losses[step] for step in "123"] == [found[step] for step in "123"]
    # masks are drawn anew after a checkpoint
    assert name == "run_mlm_no_trainer" or (losses == found and resumed == perplexity)


@pytest.mark.parametrize("file", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_configurations_are_accelerate_s(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert (
        config.distributed_type.value
        == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED", "cpu": "NO"}[file.stem]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_clm_no_trainer", "heal"])
def test_two_processes_learn_what_one_does(name, tmp_path):
    """Two processes with half the rows each: the same losses."""
    found = []
    for processes, rows in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        options = [
            "--max_steps",
            "4",
            "--per_device_train_batch_size",
            str(rows),
            "--save_strategy",
            "no",
            "--output_dir",
            str(out),
        ]
        options += ["--distil"] if name == "heal" else ["--save_steps", "100"]
        command = [sys.executable, "-W", "ignore", *launch, str(EXAMPLES / f"{name}.py"), *COMMON, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        file = out / ("healing.json" if name == "heal" else "losses.json")
        assert file.exists(), done.stderr[-3000:]
        found.append(json.loads(file.read_text()))
    # shuffling deals rows to processes differently, so that steps hold the same rows only on the whole
    after = [f["after_perplexity"] if name == "heal" else list(f.values())[-1] for f in found]
    assert after[1] == pytest.approx(after[0], rel=0.02)


def test_questions_are_answered(tmp_path):
    metrics = run("run_qa", tmp_path, "--max_steps", "30", "--learning_rate", "3e-3", "--save_strategy", "no")
    found = losses(tmp_path)
    assert found[30] < found[1] - 0.3 and metrics["eval_f1"] >= metrics["eval_exact_match"]


def test_the_likeliest_span_ends_behind_its_start():
    import numpy as np

    spans = runpy.run_path(str(EXAMPLES / "run_qa.py"))["spans"]
    starts, ends = np.zeros((1, 100)), np.zeros((1, 100))
    starts[0, [40, 90]], ends[0, [10, 45]] = [5, 4], [9, 5]
    # the best end comes before the best start
    assert spans(starts, ends) == [(40, 45)]
