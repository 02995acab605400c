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
