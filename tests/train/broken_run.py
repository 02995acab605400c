"""Training in processes of which one has an accident behind the first checkpoint.

`test_bad_input.py` starts it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

import sparse_hf
from examples import loop, run_clm
from examples.training import parse
from sparse_hf.train import CheckedCollator, TellAll, failures, heal
from tests.models.families import dense_model

STEPS, SAVED, TOKENS = 6, 2, 40
# what goes wrong -> the head that it goes wrong in
HEADS = {
    "nothing": "LlamaForCausalLM",
    "killed": "LlamaForCausalLM",
    "label of a causal model": "LlamaForCausalLM",
    "label of a masked model": "BertForMaskedLM",
    "label of a token": "BertForTokenClassification",
    "label of a row": "BertForSequenceClassification",
    "long row": "BertForMaskedLM",
}


def rows(accident: str) -> list[dict[str, torch.Tensor]]:
    """One row for each process and step, in order.

    That of the second process in the fourth step is bad.
    """
    generator, made = torch.Generator().manual_seed(0), []
    classes = 2 if "Classification" in HEADS[accident] else 97
    for row in range(2 * STEPS):
        is_bad = row == 2 * (SAVED + 1) + 1
        ids = torch.randint(4, 97, (600 if is_bad and accident == "long row" else TOKENS,), generator=generator)
        labels = ids % classes
        if is_bad and accident.startswith("label"):
            labels[5] = 1000
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels[5] if accident == "label of a row" else labels,
            }
        )
    return made


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 1 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def arguments(folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, per_device_train_batch_size=1, max_steps=STEPS, save_steps=SAVED, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip


def model(accident: str):
    return sparse_hf.sparsify(dense_model(HEADS[accident]), "window(5, 5)")


def by_trainer(accident: str, folder: str, resume: bool) -> None:
    callbacks = [Kill()] if accident == "killed" else []
    trainer = Trainer(model(accident), arguments(folder), train_dataset=rows(accident), callbacks=callbacks)
    with TellAll():
        trainer.train(resume_from_checkpoint=resume)


def by_heal(accident: str, folder: str, resume: bool) -> None:
    heal(model(accident), rows(accident), arguments(folder))


def by_hand(accident: str, folder: str, resume: bool) -> None:
    """The loop of the examples, on batches that the collator breaks."""

    def collator(model, tokenizer):
        whole = run_clm.collator(model, tokenizer).inner
        calls = iter(range(1 << 30))

        def broken(features):
            batch = whole(features)
            if next(calls) == SAVED + 1 and int(os.environ["RANK"]) == 1:
                batch["labels"][0, 5] = 1000
            return batch

        return CheckedCollator(broken, model)

    options = ["--tiny", "--use_cpu", "--output_dir", folder, "--max_steps", str(STEPS), "--save_steps", str(SAVED)]
    loop.train(AutoModelForCausalLM, "decoder", collator, *parse([*options, "--per_device_train_batch_size", "1"], ""))


def asleep(accident: str, folder: str, resume: bool) -> None:
    """As over NCCL, the other process waits in what no lost process wakes it from."""
    failures.EXIT_TIMEOUT_S = 3
    torch.distributed.init_process_group("gloo")
    with TellAll():
        if torch.distributed.get_rank() == 0:
            time.sleep(600)
        model(accident)(**{name: value[None] for name, value in rows(accident)[2 * (SAVED + 1) + 1].items()})


WAYS = {"Trainer": by_trainer, "heal": by_heal, "loop": by_hand, "asleep": asleep}


def main(way: str, accident: str, folder: str, resume: str) -> None:
    WAYS[way](accident, folder, resume == "resume")
    torch.distributed.barrier()
    sys.stdout.flush()
    # gloo's threads may abort when processes take it down one after the other: all is written, so
    # leave at once
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
