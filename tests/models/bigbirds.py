"""Random BigBirds and BigBirdPegasuses, and batches for their heads."""

from __future__ import annotations

import numpy as np
import torch
import transformers

import sparse_hf
from tests.models.families import EOS, HEADS, TINY, VOCABULARY, has_target, labels_of

FAMILIES = ("big_bird", "bigbird_pegasus")
HEADS_OF = {family: [head for head, own in HEADS.items() if own == family] for family in FAMILIES}
TARGET = 13
TEXT = torch.randint(EOS + 1, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(0))


class Case:
    """A random head, configuration and batch, drawn from a number."""

    def __init__(self, family: str, number: int, head: str | None = None, **changes):
        self.draw = np.random.default_rng(number)
        self.head = head or HEADS_OF[family][number % len(HEADS_OF[family])]
        self.size, self.count = int(self.draw.choice([3, 4, 8])), int(self.draw.integers(1, 4))
        own = {
            "attention_type": "block_sparse", "block_size": self.size, "num_random_blocks": self.count, "sep_token_id": 66,
            **dict.fromkeys(("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        }  # fmt: skip
        self.values = {**TINY[family], **own, **changes}
        dense = getattr(transformers, self.head)
        if family == "bigbird_pegasus":
            self.values = {k: v for k, v in self.values.items() if not k.startswith(("hidden_drop", "attention_prob"))}
        torch.manual_seed(number)
        self.stock = dense(dense.config_class(**self.values))
        for parameter in self.stock.parameters():
            # initial weights are so small that attention is nearly uniform, and a wrong pattern would hardly show
            if parameter.ndim == 2:
                parameter.data.mul_(3)
        self.has_encoder = family == "big_bird" or not self.head.endswith("ForCausalLM")

    def inputs(self, length: int, real: torch.Tensor) -> dict[str, torch.Tensor]:
        """Texts with labels everywhere; `real` is `[batch, length]`."""
        generator = torch.Generator().manual_seed(length)
        rows = real.shape[0]
        ids = torch.randint(EOS + 1, VOCABULARY, (rows, length), generator=generator)
        if has_target(self.head):
            # heads that classify read the state of the last token of the text
            ids[:, -1] = EOS
        batch = {"input_ids": ids, "attention_mask": real.long()}
        if has_target(self.head) and "ConditionalGeneration" not in self.head:
            batch["decoder_input_ids"] = torch.randint(EOS + 1, VOCABULARY, (rows, TARGET), generator=generator)
        for name, shape in labels_of(self.head).items():
            sizes = {1: (rows,), 2: (rows, TARGET if has_target(self.head) else length)}[len(shape)]
            batch[name] = torch.randint(0, 2, sizes, generator=generator)
        if has_target(self.head) and "SequenceClassification" in self.head:
            # it feeds the text to the decoder
            batch.pop("decoder_input_ids")
        if self.head.endswith("ForMultipleChoice"):
            batch["attention_mask"] = batch["attention_mask"][:, None].repeat(1, 2, 1)
            batch["input_ids"] = torch.stack([ids, ids.flip(1)], 1)
        return batch


def sparse_model(head: str, pattern=None, **changes):
    """A sparse model by the configuration alone: blocks of 4 tokens, 2 of them random."""
    values = {"block_size": 4, "num_random_blocks": 2, "is_decoder": head == "BigBirdForCausalLM", **changes}
    case = Case(HEADS[head], 0, head, **values)
    layers = {"layers": "decoder=window(8, 0)"} if "Pegasus" in head else {}
    return sparse_hf.sparsify(case.stock, pattern, **layers).eval()
