"""Trainer: two processes, or accumulated steps, give the loss and the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.test_published import HEADS as PUBLISHED
from tests.processes import TORCHRUN, finished

SCRIPT = Path(__file__).parent / "train_script.py"


DENSE = ("BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification", "LlamaForCausalLM")


def steps(heads: tuple[str, ...], processes: int, batch: int, accumulate: int, out: Path) -> dict:
    launch = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else []
    status, said = finished(*launch, str(SCRIPT), ",".join(heads), str(batch), str(accumulate), str(out))
    assert status == 0, said[-3000:]
    return torch.load(out, weights_only=True)


# tests/train/test_distributed.py has a dense family and one of the others in the fast suite
@pytest.mark.slow
@pytest.mark.parametrize("heads", [DENSE, PUBLISHED], ids=["dense", "sparse by themselves"])
def test_processes_and_accumulation_change_nothing(heads, tmp_path):
    whole = steps(heads, 1, 4, 1, tmp_path / "whole.pt")
    for name, processes, batch, accumulate in (("two processes", 2, 2, 1), ("accumulated", 1, 1, 4)):
        other = steps(heads, processes, batch, accumulate, tmp_path / f"{processes}.pt")
        for head in heads:
            assert len(whole[head]["losses"]) == 2 and any(g.abs().sum() > 0 for g in whole[head]["steps"].values())
            assert other[head]["losses"] == pytest.approx(whole[head]["losses"], rel=1e-4), (head, name)
            for key, change in whole[head]["steps"].items():
                torch.testing.assert_close(
                    other[head]["steps"][key],
                    change,
                    rtol=1e-3,
                    atol=2e-6,
                    msg=lambda m, name=f"{head} {key}": f"{name}: {m}",
                )
