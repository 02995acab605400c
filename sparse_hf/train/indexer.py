"""Training the indexers that `topk(..., 'indexer')` gives a dense decoder: alone first, then with all weights.

An indexer learns which keys dense attention weighs (arXiv:2512.02556, 2.1): first of the dense model, whose weights are frozen and
whose layers see everything; then of the model as it will be used, which learns by its labels, or by a teacher, to do with what is
chosen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..models import SparseMixin
from ..models.hf.indexer import Indexer
from ..models.indexed.loss import indexer_losses
from ..models.indexed.mass import kept_mass
from .heal import Healed, HealingTrainer, run_trainer

STAGES = ("alone", "all")


class IndexerTrainer(HealingTrainer):
    """Trains the indexers of a model, and measures how much of dense attention their choices keep.

    Args:
        stage: "alone" has the loss of indexers alone, of passes in which all layers see everything; "all" adds it to the loss that
            `HealingTrainer` computes.
        every: attention is looked at by one query in `every`, from one on that is drawn in each pass.
        weight: of the loss of indexers in stage "all". It has a gradient for indexers alone, so that it decides their step size and
            nothing else.

    Raises:
        ValueError: an unknown stage, or a teacher of indexers alone.

    Examples:
        >>> from transformers import TrainingArguments
        >>> from sparse_hf import sparsify
        >>> model = sparsify(AutoModelForCausalLM.from_pretrained("my-llama"), "window(31, 0) | first(4) | topk(16, 'indexer')")
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 300, (4, 64))]
        >>> args = TrainingArguments("run", use_cpu=True, report_to="none", disable_tqdm=True)
        >>> "eval_recall" in IndexerTrainer(model, args, eval_dataset=rows).evaluate()  # doctest: +ELLIPSIS
        {'eval_loss': ...}
        True
    """

    def __init__(self, *args, stage: str = STAGES[0], every: int = 1, weight: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}; the known ones are {', '.join(map(repr, STAGES))}")
        if stage == STAGES[0] and self.teacher is not None:
            raise ValueError(
                "stage 'alone' learns from the model's own dense attention; leave the teacher out, or train all"
            )
        self.stage, self.every, self.weight = stage, every, weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.stage == STAGES[0]:
            with indexer_losses(model, self.every) as losses:
                outputs = model(**without_logits(model, inputs))
            # Trainer divides losses that count items by itself
            loss = losses.mean() / self._passes(num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        with indexer_losses(model, self.every) as losses:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self.weight * losses.mean() / self._passes(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _passes(self, num_items_in_batch) -> int:
        """By what a mean over one pass is to be divided, where Trainer adds the losses of several up."""
        return 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """What `HealingTrainer` gives, and `eval_recall`: the share of dense attention on keys that patterns hold.

        It is the mean over layers, of the texts of all processes; `eval_recall_least` is that of the layer with the least.
        """
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        given = args[0] if args else kwargs.get("eval_dataset")
        model: Any = self.model
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.accelerator.autocast(), kept_mass(model) as kept:
            for inputs in self.get_eval_dataloader(given):
                model(**without_logits(model, self._prepare_inputs(inputs)))
        model.train(was_training)
        sums = torch.stack([kept.sums[layer] for layer in sorted(kept.sums)]).float().to(self.args.device)
        totals = self.accelerator.reduce(sums, "sum")
        assert isinstance(totals, torch.Tensor)
        shares = totals[:, 0] / totals[:, 1]
        found = {f"{metric_key_prefix}_recall": float(shares.mean())}
        found[f"{metric_key_prefix}_recall_least"] = float(shares.min())
        self.log(dict(found))
        return {**metrics, **found}


def without_logits(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pass in which all layers see everything, and nobody reads what it says."""
    given = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
    takes = inspect.signature(getattr(model, "module", model).forward).parameters
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    return {**given, **fewer, "decode": "dense", "use_cache": False}


def train_indexer(
    model: PreTrainedModel,
    train_dataset,
    args: TrainingArguments,
    *,
    stage: str = STAGES[0],
    every: int = 1,
    resume_from_checkpoint: str | bool | None = None,
    **trainer_options,
) -> Healed:
    """Train the indexers of a model that `sparsify` or `convert` gave them by the pattern `topk(..., 'indexer')`.

    Call it with stage "alone" first, and then, where the model itself is to get used to its choices, with stage "all".

    Args:
        model: a sparse decoder with indexers.
        train_dataset, args: as of Trainer.
        stage: "alone" trains indexers only, by the attention of the dense model; "all" trains all weights by labels, with the keys
            that are chosen, and indexers beside them.
        every: attention is looked at by one query in `every`, which takes as much less time.
        resume_from_checkpoint: as of `Trainer.train`.
        trainer_options: what else Trainer takes, and in stage "all" `teacher`, `distillation` and `edges` as of `heal`. With an
            `eval_dataset` the metrics before and after hold `before_recall` and `after_recall`, the share of dense attention that
            falls on keys that patterns hold.

    Raises:
        ValueError: a model without such indexers, an unknown stage, or gradient checkpointing.

    Examples:
        >>> from transformers import TrainingArguments
        >>> from sparse_hf import sparsify
        >>> model = sparsify(AutoModelForCausalLM.from_pretrained("my-llama"), "window(31, 0) | first(4) | topk(16, 'indexer')")
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 300, (4, 64))]
        >>> args = TrainingArguments("run", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> trained = train_indexer(model, rows, args)  # doctest: +ELLIPSIS
        {'train_runtime': ...}
    """
    if not isinstance(model, SparseMixin) or not any(isinstance(module, Indexer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no indexers; give it some with sparse_hf.sparsify(model, \"... | topk(2048, 'indexer')\")"
        )
    with _trained_parts(model, alone=stage == STAGES[0]):
        trainer = IndexerTrainer(
            model=model, args=args, train_dataset=train_dataset, stage=stage, every=every, **trainer_options
        )
        return run_trainer(trainer, resume_from_checkpoint)


@contextmanager
def _trained_parts(model: nn.Module, alone: bool) -> Iterator[None]:
    """Have only the indexers trained, if they are trained alone; what was trained before is so again behind it."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if alone:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Indexer):
                module.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
