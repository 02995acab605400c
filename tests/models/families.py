"""Tiny random models of each family, and inputs for each head: one line a head."""

from __future__ import annotations

import torch
import transformers

VOCABULARY, LENGTH, BATCH = 97, 150, 2
BERT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
         "classifier_dropout": 0.0}  # fmt: skip
TOKEN = {"labels": (BATCH, LENGTH)}
SEQUENCE = {"labels": (BATCH,)}
SPAN = {"start_positions": (BATCH,), "end_positions": (BATCH,)}
# dense class -> the labels that its loss takes, with their shapes
HEADS = {
    "BertModel": {},
    "BertForMaskedLM": TOKEN,
    "BertForPreTraining": {"labels": (BATCH, LENGTH), "next_sentence_label": (BATCH,)},
    "BertForSequenceClassification": SEQUENCE,
    "BertForTokenClassification": TOKEN,
    "BertForQuestionAnswering": SPAN,
    "BertForMultipleChoice": SEQUENCE,
    "BertForNextSentencePrediction": SEQUENCE,
    "LlamaModel": {},
    "LlamaForCausalLM": TOKEN,
    "LlamaForSequenceClassification": SEQUENCE,
    "LlamaForTokenClassification": TOKEN,
    "LlamaForQuestionAnswering": SPAN,
}
DECODERS = [name for name in HEADS if name.startswith("Llama")]


def dense_model(head: str, **changes):
    torch.manual_seed(0)
    family = "Llama" if head.startswith("Llama") else "Bert"
    config = getattr(transformers, f"{family}Config")(**{**(LLAMA if family == "Llama" else BERT), **changes})
    return getattr(transformers, head)(config).eval()


def sides(head: str) -> list[str]:
    """Where a head may be padded and still be compared: a head that pools the first token must not pool padding."""
    pooled = "labels" in HEADS[head] and HEADS[head]["labels"] == SEQUENCE["labels"] or "Pretraining" in head
    return (
        ["none", "right"]
        if head.startswith("Bert") and (pooled or "next" in str(HEADS[head]))
        else ["none", "right", "left"]
    )


PADDED = [(head, side) for head in HEADS for side in sides(head)]


def inputs(head: str, side: str = "right") -> dict[str, torch.Tensor]:
    """A batch, padded on a side; the positions are those of the tokens, so that padding on the left shifts nothing.

    Padding has no labels. Spans are labelled without padding only: their softmax runs over padding too, whose states are
    0 here (as in Transformers' own FlashAttention path) and something else in its dense one.
    """
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    real = torch.ones_like(ids)
    if side != "none":
        real[0, slice(37) if side == "left" else slice(LENGTH - 37, None)] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids * real, "attention_mask": real, "position_ids": positions}
    for name, shape in HEADS[head].items():
        label = torch.randint(0, 2, shape, generator=generator)
        if side == "none" or not name.endswith("positions"):
            # no label on padding, nor on the first token after it, which a decoder would predict from padding
            unlabelled = (real == 0) | (real.roll(1, 1) == 0)
            batch[name] = label.masked_fill(unlabelled, -100) if shape == (BATCH, LENGTH) else label
    if head == "BertForMultipleChoice":
        batch = {k: v if v.ndim == 1 else v[:, None].expand(-1, 2, -1).contiguous() for k, v in batch.items()}
    return batch
