"""Trainer: two processes, or accumulated steps, give the loss and the gradients of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "train_script.py"


def step(head: str, processes: int, batch: int, accumulate: int, out: Path) -> dict:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, "-W", "ignore", *launch, str(SCRIPT), head, str(batch), str(accumulate), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[2], timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(
    "head", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification", "LlamaForCausalLM"]
)
def test_processes_and_accumulation_change_nothing(head, tmp_path):
    whole = step(head, 1, 4, 1, tmp_path / "whole.pt")
    assert any(g.abs().sum() > 0 for g in whole["grads"].values())
    for name, processes, batch, accumulate in (("two processes", 2, 2, 1), ("accumulated", 1, 1, 4)):
        other = step(head, processes, batch, accumulate, tmp_path / f"{processes}.pt")
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-4), name
        for key, grad in whole["grads"].items():
            torch.testing.assert_close(
                other["grads"][key], grad, rtol=1e-3, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
