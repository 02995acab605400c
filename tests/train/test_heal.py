"""Healing: teachers, accumulation, LoRA, perplexity by position."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

import sparse_hf
from sparse_hf.train import Distillation, HealingTrainer, distillation, heal, lora_config
from tests.crosses import sampled
from tests.models.families import dense_model

# peft asks Transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore::UserWarning")
HEADS = ["LlamaForCausalLM", "BertForMaskedLM"]
WIDE, NARROW = "window(None, None)", "window(3, 3)"


def rows(count=4, length=40):
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(count):
        ids = torch.randint(1, 97, (length,), generator=generator)
        labels = ids.clone()
        labels[: [0, 30, 5, 36][row % 4]] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def arguments(tmp_path, **changes):
    # momentum-free steps of size 1 make gradients of differences of weights
    chosen = {
        "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "train_sampling_strategy": "sequential", **changes,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **chosen)


def pair(head, pattern):
    dense = dense_model(head)
    return dense, sparse_hf.sparsify(copy.deepcopy(dense), pattern)


def step(model, tmp_path, **options):
    """The logged loss, and the gradient of every weight."""
    changes = options.pop("changes", {})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = HealingTrainer(model, arguments(tmp_path, **changes), train_dataset=rows(), **options)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("head", HEADS)
def test_a_teacher_that_agrees_teaches_nothing(head, tmp_path):
    teacher, student = pair(head, WIDE)
    loss, grads = step(student, tmp_path, teacher=teacher, distillation=Distillation(labels=0, logits=1, hidden=1))
    assert loss == pytest.approx(0, abs=1e-6)
    assert max(float(g.abs().max()) for g in grads.values()) < 1e-4


@pytest.mark.parametrize("head", sampled(HEADS[:1], HEADS))
def test_accumulation_gives_what_one_batch_gives(head, tmp_path):
    weights = Distillation(labels=0.5, logits=1, hidden=2, temperature=3, layers=(1, 3))
    results = []
    for changes in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        teacher, student = pair(head, NARROW)
        results.append(step(student, tmp_path, teacher=teacher, distillation=weights, changes=changes))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_the_formula(head, tmp_path):
    weights = Distillation(labels=0.5, logits=0.7, hidden=2, temperature=3, layers=(1, 3))
    teacher, student = pair(head, NARROW)
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True)
        theirs = teacher(**{**batch, "labels": None}, output_hidden_states=True)
    keep, last = batch["labels"] != -100, None
    if "Causal" in head:
        keep, last = keep[:, 1:], -1
    p, q = ((o.logits[:, :last][keep].double() / 3).softmax(-1) for o in (theirs, ours))
    kl = (p * (p / q).log()).sum(-1).mean()
    squares = [
        (a[:, :last][keep] - b[:, :last][keep]).pow(2).mean()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    expected = 0.5 * ours.loss + 0.7 * 9 * kl + 2 * (squares[0] / 4 + 3 * squares[1] / 4)
    assert step(student, tmp_path, teacher=teacher, distillation=weights)[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_gradient_of_the_divergence_is_autograds(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", 4)
    student, teacher = torch.randn(2, 15, 11, generator=torch.Generator().manual_seed(0)).unbind()
    # one piece of four rows keeps none, the last is shorter
    keep = torch.tensor([True, False, True, True] + 4 * [False] + 7 * [True])
    p, q = ((x.double() / 3).softmax(-1) for x in (teacher, student.requires_grad_()))
    expected = (p * (p / q).log()).sum(-1)[keep].sum()
    got = distillation._Divergence.apply(student, teacher, keep, 3.0)
    # sums of single precision
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    grads = (torch.autograd.grad(5 * loss, student)[0] for loss in (got, expected))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_without_a_teacher_it_is_trainer(tmp_path):
    plain = pair("LlamaForCausalLM", NARROW)[1]
    Trainer(plain, arguments(tmp_path), train_dataset=rows()).train()
    healed = heal(pair("LlamaForCausalLM", NARROW)[1], rows(), arguments(tmp_path)).model
    for a, b in zip(plain.parameters(), healed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_teacher_keeps_packed_documents_apart(tmp_path):
    teacher, student = pair("BertForMaskedLM", WIDE)
    packed = [{**row, "position_ids": torch.arange(40) % 20} for row in rows()]
    trainer = HealingTrainer(
        student,
        arguments(tmp_path),
        train_dataset=packed,
        teacher=teacher,
        distillation=Distillation(labels=0, hidden=1),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_the_teacher_computes_in_the_precision_of_the_student(tmp_path):
    teacher, student = pair("LlamaForCausalLM", NARROW)
    found = []
    teacher.lm_head.register_forward_hook(lambda module, args, out: found.append(out.dtype))
    step(student, tmp_path, teacher=teacher, distillation=Distillation(), changes={"bf16": True})
    assert found == [torch.bfloat16]


@pytest.mark.cross
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_lora_trains_what_it_says_and_is_merged(head, tied, tmp_path):
    dense = dense_model(head, tie_word_embeddings=tied)
    student = sparse_hf.sparsify(copy.deepcopy(dense), NARROW)
    config = lora_config(student, rank=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 3}
    done = heal(
        student, rows(), arguments(tmp_path, **changes), teacher=dense, lora=config, eval_dataset=rows(), edges=(8, 20)
    )
    assert type(done.model) is type(student) and dict(done.model.named_parameters()).keys() == before.keys()
    is_tied = done.model.get_output_embeddings().weight is done.model.get_input_embeddings().weight
    assert is_tied == tied
    changed = {name for name, p in done.model.named_parameters() if not torch.equal(p, before[name])}
    weights = {name for name in before if name.endswith("weight")}
    # biases of linear layers stay; those of norms are trained with them
    frozen = {n for n in before if n.endswith("bias") and "norm" not in n.lower()}
    assert not changed & frozen and any("q_proj" in n or "query" in n for n in changed)
    assert any("embed" in n for n in changed) and any("norm" in n.lower() for n in changed) and changed & weights
    assert done.after["after_perplexity"] < done.before["before_perplexity"]


def test_lora_leaves_the_rest_frozen():
    from peft import get_peft_model

    student = pair("LlamaForCausalLM", NARROW)[1]
    model = get_peft_model(student, lora_config(student, rank=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    saved = {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in trained if "modules_to_save" in name}
    assert saved == {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"}


def test_perplexity_by_position_adds_up(tmp_path):
    student = pair("LlamaForCausalLM", NARROW)[1]
    trainer = HealingTrainer(student, arguments(tmp_path), eval_dataset=rows(), edges=(8, 20))
    metrics = trainer.evaluate()
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    with torch.no_grad():
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(student(**batch).loss), rel=1e-4)
        batch["labels"][:, 9:] = -100
        assert metrics["eval_perplexity_0-7"] == pytest.approx(math.exp(student(**batch).loss), rel=1e-4)
    assert {"eval_perplexity_8-19", "eval_perplexity_20-"} <= set(metrics)


def test_mistakes_are_told(tmp_path):
    dense, student = pair("LlamaForCausalLM", NARROW)
    with pytest.raises(ValueError, match="is not sparse"):
        heal(dense, rows(), arguments(tmp_path))
    with pytest.raises(ValueError, match="needs a teacher"):
        heal(student, rows(), arguments(tmp_path), distillation=Distillation())
    with pytest.raises(ValueError, match="shares weights that are trained"):
        heal(sparse_hf.sparsify(dense, NARROW), rows(), arguments(tmp_path), teacher=dense)
    with pytest.raises(ValueError, match="they must share them"):
        heal(student, rows(), arguments(tmp_path), teacher=dense_model("LlamaForCausalLM", vocab_size=98))
    with pytest.raises(ValueError, match="layers has 1 weights"):
        heal(student, rows(), arguments(tmp_path), teacher=dense, distillation=Distillation(hidden=1, layers=(1,)))
    for wrong in ({"labels": -1}, {"temperature": 0}, {"labels": 0, "logits": 0}, {"layers": (0,)}):
        with pytest.raises(ValueError, match="labels|temperature|layers"):
            Distillation(**wrong)


def test_what_zero_3_spreads_is_refused_before_anything_is_trained(tmp_path):
    teacher, student = pair("LlamaForCausalLM", NARROW)
    # as DeepSpeed marks the weights of which it leaves each process a part
    next(teacher.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="a part of the teacher"):
        heal(student, rows(), arguments(tmp_path), teacher=teacher)
    next(student.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="use DDP, or train all weights"):
        heal(student, rows(), arguments(tmp_path), lora=lora_config(student, 4))


def test_a_run_that_goes_on_says_what_was_before_the_first(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    first, again = (pair("LlamaForCausalLM", NARROW)[1] for _ in range(2))
    made = TrainingArguments(**{**arguments(tmp_path).to_dict(), **options})
    whole = heal(first, rows(), made, eval_dataset=rows())
    resumed = heal(again, rows(), made, eval_dataset=rows(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.before["before_perplexity"] == whole.before["before_perplexity"] != whole.after["after_perplexity"]
    assert resumed.after["after_perplexity"] == whole.after["after_perplexity"]


@pytest.mark.parametrize("with_lora", [False, True])
def test_what_is_healed_decodes_with_a_cache_as_before(with_lora, tmp_path):
    model = pair("LlamaForCausalLM", NARROW)[1]
    healed = heal(model, rows(), arguments(tmp_path), lora=lora_config(model, 4) if with_lora else None).model
    healed.save_pretrained(tmp_path / "healed")
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["use_cache"] is True
