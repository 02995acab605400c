"""Label smoothing, which Trainer computes itself, shifts as for dense models."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import sparse_hf
from sparse_hf.train import Distillation, HealingTrainer
from tests.models.families import dense_model

# Trainer finds decoders by the name of their class, in a table of Transformers
HEADS = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Qwen3MoeForCausalLM",
    "BertLMHeadModel",
    "BertForMaskedLM",
    "BertForTokenClassification",
    "BartForConditionalGeneration",
]


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], label_smoothing_factor=0.1, **changes)


def batch(head: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    labels = ids % 2 if "Classification" in head else ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("head", HEADS)
def test_the_smoothed_loss_is_the_dense_models(head, tmp_path):
    dense = dense_model(head, is_decoder=True) if head == "BertLMHeadModel" else dense_model(head)
    for parameter in dense.parameters():
        # answers that differ from token to token
        if parameter.ndim == 2:
            parameter.data.mul_(3)
    found = []
    for model in (dense, sparse_hf.sparsify(dense, "window(None, None)")):
        trainer = Trainer(model.eval(), arguments(tmp_path))
        found.append(float(trainer.compute_loss(model, batch(head)).detach()))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_healing_smooths_labels_beside_a_teacher(tmp_path):
    """Trainer takes labels out of the batch, and the teacher's terms need them still."""
    teacher = dense_model("BertForMaskedLM")
    student = sparse_hf.sparsify(dense_model("BertForMaskedLM"), "window(3, 3)").train()
    found = {}
    for weights in (Distillation(), Distillation(logits=0.0), Distillation(labels=0.0)):
        trainer = HealingTrainer(student, arguments(tmp_path), teacher=teacher, distillation=weights)
        given = batch("BertForMaskedLM")
        found[weights] = float(trainer.compute_loss(student, given).detach())
        assert set(given) == {"input_ids", "labels"}
    both, labels, logits = found.values()
    assert both == pytest.approx(labels + logits, rel=1e-5) and min(labels, logits) > 0
