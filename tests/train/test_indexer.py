"""Training indexers: which weights learn, what attention is kept, accumulation, going on, teachers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainingArguments

import sparse_hf
from sparse_hf.models.hf.indexer import Indexer
from sparse_hf.train import Distillation, IndexerTrainer, train_indexer
from tests.crosses import sampled
from tests.models.families import dense_model
from tests.models.test_parity import enable_checkpointing

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore::UserWarning")
NEAR = "window(3, 0) | first(1)"


def dense():
    made = dense_model("LlamaForCausalLM")
    for layer in made.model.layers:
        # attention that is far from uniform
        layer.self_attn.q_proj.weight.data.mul_(8)
    return made


def model(near: str = NEAR):
    return sparse_hf.sparsify(dense(), f"{near} | topk(6, 'indexer')", indexer={"heads": 2, "width": 8})


def rows(count=4, length=40):
    drawn = torch.randint(5, 97, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in drawn]


def arguments(folder, **changes) -> TrainingArguments:
    chosen = {
        "per_device_train_batch_size": 4, "max_steps": 30, "learning_rate": 1e-2, "train_sampling_strategy": "sequential",
        "save_strategy": "no", "lr_scheduler_type": "constant", **changes,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **chosen)


def changed(made, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}


def of_indexers(made) -> set[str]:
    return {name for name, _ in made.named_parameters() if ".indexer." in name}


def test_indexers_alone_learn_what_dense_attention_weighs(tmp_path):
    made = model()
    made.lm_head.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    trained = train_indexer(made, rows(), arguments(tmp_path), eval_dataset=rows())
    assert trained.model is made and changed(made, before) == of_indexers(made)
    assert trained.after["after_recall"] > trained.before["before_recall"] + 0.02
    assert trained.after["after_recall_least"] <= trained.after["after_recall"] < 1
    assert trained.after["after_perplexity"] != trained.before["before_perplexity"]
    # what was trained before is trained again, and what was not is not
    assert [name for name, p in made.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_then_all_weights_learn_with_what_is_chosen(tmp_path):
    made = model()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    trained = train_indexer(made, rows(), arguments(tmp_path), stage="all", every=2, eval_dataset=rows())
    assert changed(made, before) == set(before)
    assert trained.after["after_perplexity"] < trained.before["before_perplexity"]
    assert trained.after["after_recall"] > trained.before["before_recall"]


def test_a_teacher_of_all_weights(tmp_path):
    made, teacher = model("window(None, None)"), dense()
    losses = Distillation(labels=0, logits=1)
    args = arguments(tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0)
    trainer = IndexerTrainer(made, args, train_dataset=rows(), stage="all", teacher=teacher, distillation=losses)
    trainer.train()
    # the student is the teacher, and its indexers have nothing to choose
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="leave the teacher out"):
        IndexerTrainer(made, args, train_dataset=rows(), teacher=teacher)


@pytest.mark.parametrize("stage", sampled(["all"], ["alone", "all"]))
def test_accumulation_gives_what_one_batch_gives(stage, tmp_path):
    found = []
    for changes in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        made = model()
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "logging_steps": 1}
        trainer = IndexerTrainer(made, arguments(tmp_path, **options, **changes), train_dataset=rows(), stage=stage)
        trainer.train()
        loss = trainer.state.log_history[0]["loss"]
        found.append((loss, {name: before[name] - p.detach() for name, p in made.named_parameters()}))
    (loss, whole), (other, parts) = found
    # a batch counts queries by their share of attention, and steps count batches
    assert other == pytest.approx(loss, rel=0.05)
    for name, gradient in whole.items():
        if ".indexer." not in name and gradient.any():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)
        elif ".indexer." in name:
            assert torch.nn.functional.cosine_similarity(parts[name].flatten(), gradient.flatten(), dim=0) > 0.9, name


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    one, other = model(), model()
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole = train_indexer(one, rows(), args, eval_dataset=rows())
    resumed = train_indexer(
        other, rows(), args, eval_dataset=rows(), resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert resumed.before["before_recall"] == whole.before["before_recall"]
    assert resumed.after["after_recall"] == whole.after["after_recall"]
    for name, p in one.named_parameters():
        assert torch.equal(p, dict(other.named_parameters())[name]), name


def test_mixed_precision_stays_with_training(tmp_path):
    made = model()
    text = rows(1)[0]["input_ids"][None]
    train_indexer(made, rows(), arguments(tmp_path, max_steps=1, bf16=True))
    again = copy.deepcopy(made)
    assert "forward" not in vars(made)
    with torch.no_grad():
        assert torch.equal(made(text).logits, again(text).logits)
    trainer = IndexerTrainer(made, arguments(tmp_path, max_steps=1, bf16=True), train_dataset=rows())
    trainer.train()
    # accelerate has left it a forward of its own, which is that of this model
    narrow = sparse_hf.sparsify(made, NEAR)
    assert "forward" in vars(made) and not any(isinstance(module, Indexer) for module in narrow.modules())
    with torch.no_grad():
        wanted = sparse_hf.sparsify(again, NEAR)(text).logits
        assert not torch.allclose(narrow(text).logits, made(text).logits, atol=1e-4)
    torch.testing.assert_close(narrow(text).logits.detach(), wanted)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no indexers"):
        train_indexer(sparse_hf.sparsify(dense_model("LlamaForCausalLM"), NEAR), rows(), arguments(tmp_path))
    with pytest.raises(ValueError, match="stage is 'both'; the known ones are 'alone', 'all'"):
        train_indexer(model(), rows(), arguments(tmp_path), stage="both")
    with pytest.raises(ValueError, match="every is 0"):
        train_indexer(model(), rows(), arguments(tmp_path), every=0)
    with pytest.raises(ValueError, match="switch it off"):
        made = model()
        enable_checkpointing(made)
        train_indexer(made, rows(), arguments(tmp_path))


def test_one_indexer_learns_for_several_layers(tmp_path):
    made = sparse_hf.sparsify(dense(), f"{NEAR} | topk(6, 'indexer')", indexer={"heads": 2, "width": 8, "share": 2})
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    trained = train_indexer(made, rows(), arguments(tmp_path), eval_dataset=rows())
    assert changed(made, before) == of_indexers(made) and of_indexers(made) < of_indexers(model())
    assert trained.after["after_recall"] > trained.before["before_recall"] + 0.02
