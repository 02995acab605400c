"""Two optimizer steps with Trainer per head, run by test_training.py in one process or several."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

import sparse_hf
from tests.models.families import dense_model
from tests.models.test_published import HEADS as PUBLISHED
from tests.models.test_published import sparse_model as published_model

ROWS, TOKENS, STEPS, RATE = 8, 40, 2, 0.25


def rows(head: str) -> list[dict[str, torch.Tensor]]:
    """Rows with very different numbers of labels, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(ROWS):
        ids = torch.randint(1, 97, (TOKENS,), generator=generator)
        labels = ids % 2 if "Token" in head else ids.clone()
        # Longformer and LED take 1 for padding
        ids[ids == 1] = 4
        labels[: [0, 30, 5, 38][row % 4]] = -100
        marks = torch.zeros_like(ids)
        marks[[3, 20]] = 1
        label = torch.tensor(row % 2) if "Sequence" in head else labels
        made.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label, "global_attention_mask": marks}
        )
    return made


def model_of(head: str):
    """A dense family with a pattern, or one that is sparse by itself with its own."""
    if head in PUBLISHED:
        return published_model(head)
    return sparse_hf.sparsify(dense_model(head), "window(5, 5) | marked()")


def train(head: str, batch: int, accumulate: int, folder: Path) -> dict:
    """The loss of each step, and what the steps changed in the parameters."""
    model = model_of(head)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=STEPS, learning_rate=RATE, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(head))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "steps": {name: before[name] - p.detach() for name, p in model.named_parameters()}}


def main(heads: str, batch: int, accumulate: int, out: str) -> None:
    found = {head: train(head, batch, accumulate, Path(out).parent / "trainer") for head in heads.split(",")}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(found, out)
    if torch.distributed.is_initialized():
        # gloo's threads may abort or hang when processes take it down one after the other: all is written, so leave at once
        torch.distributed.barrier()
        sys.stdout.flush()
        time.sleep(1)
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
