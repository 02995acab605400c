"""The loop of Trainer by hand, with accelerate, accumulation and checkpoints.

A run that goes on from a checkpoint has the losses of one that was not interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, patch_environment, set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from examples.run_clm import packed
from examples.training import checkpoint, leave, load_model, load_texts
from sparse_hf.train import RepeatableCollator, TellAll, labelled, without_repeated


@dataclass
class Progress:
    """Where the loop is; accelerate saves it with the weights."""

    step: int = 0
    losses: dict[int, float] = field(default_factory=dict)

    def state_dict(self) -> dict:
        return {"step": self.step, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.losses = state["step"], state["losses"]


def count(model, batch) -> torch.Tensor:
    """Tokens that the loss is a mean of."""
    return labelled(model, batch["labels"]).sum()


def evaluate(accelerator, model, loader) -> float:
    model.eval()
    sums = torch.zeros(2, device=accelerator.device)
    for batch in loader:
        batch["labels"] = without_repeated(accelerator, batch["labels"])
        with torch.no_grad():
            loss, tokens = model(**batch).loss, count(model, batch)
        if tokens:
            sums += torch.stack([loss.float() * tokens, tokens.float()])
    model.train()
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    return total / tokens


def optimize(accelerator, model, optimizer, scheduler, batches, args) -> float:
    """Take one step on several batches; the mean loss of their tokens everywhere."""
    # heads divide by the number of tokens of the whole step, and accelerate averages over processes
    # and batches
    tokens = accelerator.reduce(sum(count(model, batch) for batch in batches).to(accelerator.device), "sum").clamp(
        min=1
    )
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=tokens).loss
            total += loss.detach()
            accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    scheduler.step()
    return float(accelerator.reduce(total, "sum"))


def steps(accelerator, loader, collate, start: int, total: int, seed: int):
    """The batches of each optimizer step from `start` on.

    Epochs are drawn from their number, so that none need be replayed.
    """
    accumulate = accelerator.gradient_accumulation_steps
    each = len(loader) // accumulate
    if not each:
        raise ValueError(
            f"the texts make {len(loader)} batches and --gradient_accumulation_steps is {accumulate}, so that an epoch has no step; "
            "give more texts, or ask for shorter rows, fewer of them in a batch, or fewer batches in a step"
        )
    for epoch in range(start // each, -(-total // each)):
        set_seed(seed + epoch)
        loader.set_epoch(epoch)
        if isinstance(collate, RepeatableCollator):
            collate.epoch = epoch
        skipped = start % each if epoch == start // each else 0
        batches = iter(accelerator.skip_first_batches(loader, skipped * accumulate) if skipped else loader)
        for _ in range(skipped, min(each, total - epoch * each)):
            yield [next(batches) for _ in range(accumulate)]


def save(accelerator, model, tokenizer, progress: Progress, folder: Path) -> None:
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        (folder / "losses.json").write_text(json.dumps(progress.losses))


def train(auto_class, kind: str, collator: Callable, model_args, data_args, args) -> float:
    """Train on packed rows, save, and give the perplexity.

    `kind` is "decoder" or "encoder"; the collator is `collator(model, tokenizer)`.
    """
    if data_args.streaming:
        raise ValueError("--streaming has no order to go on in after a checkpoint; use the example with Trainer")
    # rows come in an order that does not depend on the number of processes
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    # what a launcher's configuration says of it goes before arguments, and may be "auto", which
    # only Trainer understands
    with patch_environment(accelerate_gradient_accumulation_steps=args.gradient_accumulation_steps):
        accelerator = Accelerator(cpu=args.use_cpu, dataloader_config=order)
    texts = load_texts(model_args, data_args)
    model, tokenizer = load_model(auto_class, kind, model_args, args)
    collate = collator(model, tokenizer)
    with accelerator.main_process_first():
        rows, evaluation = (packed(d, tokenizer, model, data_args, model_args.length) for d in texts)
    loader = DataLoader(rows, args.per_device_train_batch_size, shuffle=True, collate_fn=collate, drop_last=True)
    eval_loader = DataLoader(evaluation, args.per_device_eval_batch_size, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    warmup = args.get_warmup_steps(args.max_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, args.max_steps)
    # the scheduler counts steps of the optimizer, whatever the processes and batches in each, so
    # that accelerate leaves it alone
    model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, loader, eval_loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, scheduler)
    found = checkpoint(args)
    if found:
        accelerator.load_state(found)
    with TellAll():
        model.train()
        for batches in steps(accelerator, loader, collate, progress.step, args.max_steps, args.seed):
            # dropout is drawn from the step's number
            set_seed(args.seed + progress.step, device_specific=True)
            loss = optimize(accelerator, model, optimizer, scheduler, batches, args)
            progress.step += 1
            progress.losses[progress.step] = loss
            if progress.step % int(args.logging_steps) == 0:
                rate = scheduler.get_last_lr()[0]
                accelerator.print(f"step {progress.step}: loss {loss:.4f}, learning rate {rate:.2e}")
            if progress.step % int(args.save_steps) == 0:
                accelerator.save_state(str(Path(args.output_dir) / f"checkpoint-{progress.step}"))
        perplexity = math.exp(evaluate(accelerator, model, eval_loader))
    accelerator.print(f"perplexity {perplexity:.2f}")
    save(accelerator, model, tokenizer, progress, Path(args.output_dir))
    model, optimizer, loader, eval_loader = accelerator.free_memory(model, optimizer, loader, eval_loader)
    leave()
    return perplexity
