"""Healing: a converted model gets used to its pattern.

It learns by more pre-training, or from the dense teacher.

Legend: B batch, L tokens of a row, T tokens that have a label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..models import SparseMixin, sparsify
from ..models.hf.sparsify import forget_preparation
from ..pattern import Window
from .distillation import IGNORED, Distillation, check_teacher, distillation_loss, labelled, shifts
from .failures import TellAll
from .long_text import long_text, long_text_of
from .lora import add_lora
from .spread import is_partitioned, receive_weights


class HealingTrainer(Trainer):
    """Trainer with a teacher in the loss, and perplexity by position.

    Added terms are sums over labelled tokens divided by the number of those of the whole step, over
    all accumulated batches and processes, as Trainer divides the loss of labels: accumulation gives
    what one large batch gives.

    Args:
        teacher: a model with the same tokens; None trains on labels alone.
        distillation: the weights of the loss.
        edges: positions at which perplexity is split: `(512, 2048)` gives 0-511, 512-2047 and
            2048-.

    Raises:
        ValueError: a teacher of another vocabulary or depth, one whose weights would be trained
            too, or one that ZeRO-3 spread.

    Examples:
        >>> from transformers import TrainingArguments
        >>> from sparse_hf import sparsify
        >>> dense = AutoModelForCausalLM.from_pretrained("my-llama")
        >>> sparse = sparsify(AutoModelForCausalLM.from_pretrained("my-llama"), "window(31, 0) | first(4)")
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 300, (4, 64))]
        >>> args = TrainingArguments("run", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> trainer = HealingTrainer(sparse, args, train_dataset=rows, teacher=dense)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        1
    """

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel | None = None,
        distillation: Distillation | None = None,
        edges: Sequence[int] = (),
        **kwargs,
    ):
        config = getattr(args[0] if args else kwargs.get("model"), "config", None)
        # Trainer takes it from its own arguments, and a folder that is saved would say so
        self.used_cache = getattr(config, "use_cache", None)
        super().__init__(*args, **kwargs)
        if list(edges) != sorted(set(edges)) or any(edge < 1 for edge in edges):
            raise ValueError(f"edges is {list(edges)}; it must be growing positions from 1")
        self.edges = tuple(edges)
        self.distillation = distillation or Distillation()
        self.teacher = None if teacher is None else self.prepared(teacher)
        self._sums: Tensor | None = None

    def prepared(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The teacher as it is used: sparse with all pairs, frozen, on this device."""
        student = self.accelerator.unwrap_model(self.model)
        check_teacher(student, teacher, self.distillation)
        if is_partitioned(teacher):
            raise ValueError(
                "DeepSpeed's ZeRO-3 left each process a part of the teacher, which nothing gathers; load the teacher before "
                "TrainingArguments are made, or use FSDP2"
            )
        if not isinstance(teacher, SparseMixin):
            # with a pattern of all pairs it computes what it did, and keeps packed documents apart
            # as the student does
            teacher = sparsify(teacher, Window(None, None))
        like_student = long_text_of(student)
        if like_student is not None:
            long_text(teacher, **{**like_student.options, "checkpoint_layers": False, "offload": False})
        receive_weights(teacher.requires_grad_(False).eval(), self.args.device)
        return teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ValueError(f"a batch has {sorted(inputs)}, but no labels, which say what tokens are learned from")
        # a copy: Trainer takes labels out of what it is given where it computes the loss itself, as
        # for label smoothing
        asked = {**inputs, "output_hidden_states": True} if self.distillation.hidden > 0 else dict(inputs)
        loss, outputs = super().compute_loss(model, dict(asked), True, num_items_in_batch)
        left_out = {"labels"} if self.teacher.config.uses_marks else {"labels", "global_attention_mask"}
        # autocast is around the student's forward only
        with torch.no_grad(), self.accelerator.autocast():
            teacher_outputs = self.teacher(**{name: value for name, value in asked.items() if name not in left_out})
        count, processes = num_items_in_batch, self._processes()
        if count is None:
            count, processes = labelled(model, inputs["labels"]).sum().clamp(min=1), 1
        added = distillation_loss(model, outputs, teacher_outputs, inputs["labels"], self.distillation) / count
        loss = self.distillation.labels * loss + added * processes
        return (loss, outputs) if return_outputs else loss

    def _processes(self) -> int:
        """How many processes with batches of their own Trainer averages gradients over.

        1 where it does not count items over all of them.
        """
        if not self.args.average_tokens_across_devices:
            return 1
        config = getattr(self.accelerator, "parallelism_config", None)
        return self.accelerator.num_processes // (config.tp_size if config is not None else 1)

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """What Trainer's does, and perplexity, also by position.

        Names are `eval_perplexity` and, between edges, `eval_perplexity_0-511`.
        """
        self._sums = torch.zeros(2, len(self.edges) + 1, dtype=torch.float64)
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # summed on the device, which all back ends can do in single precision
        totals = self.accelerator.reduce(self._sums.float().to(self.args.device), "sum")
        assert isinstance(totals, Tensor)
        nll, count = totals.double().cpu()
        self._sums = None
        found = {"perplexity": _perplexity(nll.sum(), count.sum())}
        starts = (0, *self.edges)
        for i, start in enumerate(starts if self.edges else ()):
            end = starts[i + 1] - 1 if i + 1 < len(starts) else ""
            found[f"perplexity_{start}-{end}"] = _perplexity(nll[i], count[i])
        found = {f"{metric_key_prefix}_{name}": value for name, value in found.items() if value is not None}
        self.log(dict(found))
        return {**metrics, **found}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._sums is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        first = logits[0] if isinstance(logits, tuple) else logits
        assert first is not None
        self._sums += self._losses_by_position(model, first, self._prepare_inputs(inputs))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def _losses_by_position(self, model, logits: Tensor, inputs) -> Tensor:
        """Sums of losses and numbers of labels, `[2, number of edges + 1]`."""
        labels = without_repeated(self.accelerator, inputs["labels"])
        keep = labelled(model, labels)
        positions = inputs.get("position_ids")
        if positions is None:
            real = inputs.get("attention_mask", torch.ones_like(labels))
            positions = (real.cumsum(1) - 1).clamp(min=0) if real.shape == labels.shape else torch.zeros_like(labels)
        targets = labels[:, 1:][keep] if shifts(model) else labels[keep]
        positions = positions.expand_as(labels)[:, : keep.shape[1]][keep]
        nll = F.cross_entropy(logits[:, : keep.shape[1]][keep].float(), targets, reduction="none")  # [T]
        bucket = torch.bucketize(positions, torch.tensor(self.edges, device=positions.device), right=True)
        values = torch.stack([nll, torch.ones_like(nll)]).double().cpu()
        return torch.zeros(2, len(self.edges) + 1, dtype=torch.float64).index_add_(1, bucket.cpu(), values)


def without_repeated(accelerator, labels: Tensor) -> Tensor:
    """`[B, L]` labels without those of rows that were seen before.

    Such rows fill up the last batches of several processes.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return labels
    # rows of the last step stand process by process, the repeated ones behind all others
    row = torch.arange(len(labels), device=labels.device) + accelerator.process_index * len(labels)
    return labels.masked_fill((row >= state.remainder)[:, None], IGNORED)


def _perplexity(nll: Tensor, count: Tensor) -> float | None:
    return math.exp(min(float(nll / count), 700.0)) if count else None


@dataclass(frozen=True)
class Healed:
    """The model, with LoRA merged into it, and metrics before and after.

    Without evaluation data there are no metrics.

    FSDP and DeepSpeed's ZeRO-3 leave each process a part of the model: `state_dict` is then the
    whole on the main process, and `model.save_pretrained(folder, state_dict=state_dict)` saves it
    in any case.
    """

    model: PreTrainedModel
    before: dict[str, float]
    after: dict[str, float]
    state_dict: Mapping[str, Any] | None = None


def heal(
    model: PreTrainedModel,
    train_dataset,
    args: TrainingArguments,
    *,
    teacher: PreTrainedModel | None = None,
    distillation: Distillation | None = None,
    lora=None,
    eval_dataset=None,
    edges: Sequence[int] = (),
    resume_from_checkpoint: str | bool | None = None,
    **trainer_options,
) -> Healed:
    """Train a converted model until it is used to its pattern.

    Args:
        model: a sparse model with labels for its tokens (a causal or a masked language model).
        train_dataset, args: as of Trainer.
        teacher: the dense model, or any other of the same vocabulary; None continues pre-training.
        distillation: what is learned from the teacher, by default labels and logits alike.
        lora: None trains all weights; a `peft.LoraConfig` trains what it says, see `lora_config`.
            Weights are merged at the end.
        eval_dataset: what perplexity is measured on, before and after, also by position.
        edges: positions at which perplexity is split.
        resume_from_checkpoint: as of `Trainer.train`.
        trainer_options: what else Trainer takes: data_collator, processing_class, callbacks, ...

    Raises:
        ValueError: a model that is not sparse, a distillation without a teacher, a teacher that
            does not fit, or LoRA where FSDP or ZeRO-3 spread the model.

    Examples:
        >>> from transformers import TrainingArguments
        >>> from sparse_hf import sparsify
        >>> model = sparsify(AutoModelForCausalLM.from_pretrained("my-llama"), "window(31, 0) | first(4)")
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 300, (4, 64))]
        >>> args = TrainingArguments("run", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> healed = heal(model, rows, args)  # doctest: +ELLIPSIS
        {'train_runtime': ...}
    """
    if not isinstance(model, SparseMixin):
        raise ValueError(f"{type(model).__name__} is not sparse; call sparsify or convert first")
    if distillation is not None and teacher is None:
        raise ValueError("distillation needs a teacher; give the dense model")
    if lora is not None:
        model = add_lora(model, lora)
    trainer = HealingTrainer(
        model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, teacher=teacher,
        distillation=distillation, edges=edges, **trainer_options,
    )  # fmt: skip
    return run_trainer(trainer, resume_from_checkpoint, with_lora=lora is not None)


def run_trainer(
    trainer: HealingTrainer, resume_from_checkpoint: str | bool | None = None, with_lora: bool = False
) -> Healed:
    """Train, and evaluate before and after.

    Raises:
        ValueError: LoRA where FSDP or ZeRO-3 spread the model.
    """
    assert isinstance(trainer.model, torch.nn.Module)
    is_spread = trainer.is_fsdp_enabled or is_partitioned(trainer.model)
    if is_spread and with_lora:
        raise ValueError(
            "LoRA is merged at the end, and FSDP or ZeRO-3 leave each process a part of the weights; use DDP, or train all weights"
        )
    first = _EvaluateFirst(trainer)
    with TellAll():
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        after = trainer.evaluate(metric_key_prefix="after") if trainer.eval_dataset is not None else {}
        # all processes give their parts
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_spread else None
    healed = trainer.accelerator.unwrap_model(trainer.model)
    if not is_spread:
        forget_preparation(healed)
    if trainer.used_cache is not None:
        healed.config.use_cache = trainer.used_cache
    return Healed(healed.merge_and_unload() if with_lora else healed, first.metrics, after, whole)


class _EvaluateFirst(TrainerCallback):
    """Evaluates when training begins.

    Before that, FSDP and ZeRO-3 have not spread the model and cannot evaluate it.

    A run that goes on from a checkpoint takes what was logged then.
    """

    def __init__(self, trainer: HealingTrainer):
        self.trainer = trainer
        self.metrics: dict[str, float] = {}
        if trainer.eval_dataset is not None:
            trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            self.metrics = self.trainer.evaluate(metric_key_prefix="before")
            return
        for entry in state.log_history:
            self.metrics |= {name: value for name, value in entry.items() if name.startswith("before_")}
