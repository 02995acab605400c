"""Masks that a run which goes on from a checkpoint draws again."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from .columns import Collator, Feature, tokens


@dataclass
class RepeatableCollator(TrainerCallback):
    """What `inner` makes, with draws that depend on batch and epoch alone.

    Without it draws (masks of `DataCollatorForLanguageModeling`) depend on all that was drawn
    before, loaders fetch ahead, and a run that goes on from a checkpoint masks other tokens.
    Trainer gives the epoch to callbacks only, so pass it twice:
    `Trainer(data_collator=c, callbacks=[c])`; a loop by hand sets `epoch`. Workers that outlive an
    epoch (`dataloader_persistent_workers`) keep the epoch that they began with.

    Args:
        inner: a collator that draws from torch's generator.
        seed: another one gives other draws.

    Examples:
        >>> from transformers import DataCollatorForLanguageModeling
        >>> collator = RepeatableCollator(DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained("my-bert")), seed=1)
        >>> rows = [{"input_ids": list(range(5, 30))}]
        >>> torch.equal(collator(rows)["labels"], collator(rows)["labels"])
        True
    """

    inner: Collator
    seed: int = 0
    epoch: int = field(default=0, init=False)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # the share of epochs that are done, of a run that goes on in the middle of one
        self.epoch = int(state.epoch + 1e-6)

    def __call__(self, features: Sequence[Feature]) -> Mapping[str, Any]:
        seed = zlib.crc32(f"{self.seed} {self.epoch}".encode())
        for feature in features:
            seed = zlib.crc32(tokens(feature).numpy().tobytes(), seed)
        before = torch.get_rng_state()
        # the CPU's alone: torch.manual_seed would seed GPUs too
        torch.default_generator.manual_seed(seed)
        try:
            return self.inner(features)
        finally:
            torch.set_rng_state(before)
