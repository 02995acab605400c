"""Batches that a model cannot take are refused before they leave the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..models.limits import check_batch
from .columns import Collator, Feature
from .distillation import plain


@dataclass
class CheckedCollator:
    """What `inner` makes, if the model can take it. On a GPU, a label or a position out of range ends the process instead.

    Args:
        inner: the outermost of the other collators.
        model: the sparse model that is trained; only its configuration is kept.

    Raises:
        ValueError: ids, labels or positions out of range, or rows longer than the table of positions.
    """

    inner: Collator
    model: InitVar[PreTrainedModel]
    config: PreTrainedConfig = field(init=False)
    head: str = field(init=False)

    def __post_init__(self, model):
        self.config, self.head = plain(model).config, type(plain(model)).__name__

    def __call__(self, features: Sequence[Feature]) -> Mapping[str, Any]:
        batch = self.inner(features)
        check_batch(self.config, self.head, batch)
        return batch
