"""`Trainer` over texts that are split over processes, by accelerate's own setting for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from .split_sequence import SplitSequence, split_sequence

# the mixin stands before a trainer, whose attributes a type checker finds here
_Trainer = Trainer if TYPE_CHECKING else object


class SplitTrainerMixin(_Trainer):
    """For trainers: `ParallelismConfig(cp_size=4)` has four processes share each text, by what its pattern reaches.

    Accelerate gives these processes the same batches, and averages gradients over all. Its own ring
    of dense attention is left out. Without `cp_size` the trainer is what it was.

    Example: `class SplitSFTTrainer(SplitTrainerMixin, SFTTrainer): ...`

    Attributes:
        split: the handle of `split_sequence`; None where texts are whole.

    Raises:
        NotImplementedError: label smoothing, a loss or metrics of one's own, which want whole logits.
    """

    split: SplitSequence | None = None

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        config = self.accelerator.parallelism_config
        if config is None or not config.cp_enabled:
            return
        without_ring(self.accelerator)
        assert self.model is not None
        mesh = self.accelerator.torch_device_mesh
        assert mesh is not None
        self.split = split_sequence(self.model, mesh["cp"])

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]):
        if self.split is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        # the model takes its part itself
        return nullcontext, inputs

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.split is not None:
            wants = {
                "label_smoothing_factor": self.label_smoother,
                "compute_loss_func": self.compute_loss_func,
                "compute_metrics": self.compute_metrics,
            }
            asked = next((name for name, value in wants.items() if value is not None), None)
            if asked is not None:
                raise NotImplementedError(
                    f"{asked} wants logits of whole texts, of which each process has a part; do without, or set cp_size=1"
                )
        return super().compute_loss(model, inputs, *args, **kwargs)


class SplitTrainer(SplitTrainerMixin, Trainer):
    """[`Trainer`] whose texts `ParallelismConfig(cp_size=...)` splits over processes."""


def without_ring(accelerator: Any) -> None:
    """Have an `Accelerator` with `cp_size` leave attention to the model, which is split by `split_sequence`.

    Its own way takes the mask from attention layers, and replaces dense attention by a ring.
    """
    # an attribute of the instance: what `prepare` calls to hang the ring into a model
    accelerator._prepare_cp = _unchanged


def _unchanged(*prepared: Any) -> tuple[Any, ...]:
    return prepared
