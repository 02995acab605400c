"""Batches that a model cannot take are refused before they leave the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..models.hf.input_checks import Limits
from .columns import Collator, Feature
from .distillation import unwrapped


@dataclass
class CheckedCollator:
    """What `inner` makes, if the model can take it.

    On a GPU, a label or a position out of range ends the process instead.

    Args:
        inner: the outermost of the other collators.
        model: the sparse model that is trained; only its configuration is kept.

    Raises:
        ValueError: ids, labels or positions out of range, or rows longer than the model has
            positions for; those of rotary models end at `max_position_embeddings`, beyond which
            `forward` only warns.

    Examples:
        >>> from sparse_hf import sparsify
        >>> model = sparsify(AutoModelForCausalLM.from_pretrained("my-llama"), "window(31, 0) | first(4)")
        >>> collator = CheckedCollator(DataCollatorWithPadding(AutoTokenizer.from_pretrained("my-llama")), model)
        >>> collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])["input_ids"].shape
        torch.Size([2, 3])
    """

    inner: Collator
    model: InitVar[PreTrainedModel]
    limits: Limits = field(init=False)

    def __post_init__(self, model):
        self.limits = Limits.of(unwrapped(model))

    def __call__(self, features: Sequence[Feature]) -> Mapping[str, Any]:
        batch = self.inner(features)
        self.limits.check(batch, beyond=False)
        return batch
