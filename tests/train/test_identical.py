"""What must change nothing changes nothing.

Accumulation, checkpointing, half precision, compilation, going on from a checkpoint.

Models and batches are those of `ranks.py`, patterns head by head, padding or packed documents, a
half without labels.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, TrainerState

import sparse_hf
from examples import tiny
from sparse_hf.train import RepeatableCollator
from tests.crosses import sampled
from tests.train import ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
CASES = [(family, data) for family in ranks.HEADS for data in ranks.DATA[family]]
FEW = [("bert", "padded"), ("llama", "packed"), ("longformer", "padded")]


def sparse_model(family: str, dropout: float = 0.0):
    model = sparse_hf.sparsify(ranks.stock(family).float(), ranks.SPARSE[family])
    for name in ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"):
        if hasattr(model.config, name):
            setattr(model.config, name, dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def together(grads: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.double().flatten() for _, grad in sorted(grads.items())])


@pytest.mark.parametrize(("family", "data"), CASES)
def test_two_times_four_rows_are_eight(family, data):
    """Gradients add up to those of Transformers' model with all rows.

    Also where four rows have no labels.
    """
    model, batch = sparse_model(family).double(), ranks.whole_batch(family, data)
    tokens, total = ranks.count(family, batch), 0.0
    for half in range(2):
        rows = {name: value.tensor_split(2)[half] for name, value in batch.items()}
        loss = model(**rows, num_items_in_batch=tokens).loss
        loss.backward()
        total += float(loss.detach())
    wanted = ranks.expected(family, data)
    assert total == pytest.approx(float(wanted.pop("loss")), rel=1e-6)
    found, wanted = together(gradients(model)), together(wanted)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("labels", ["no rows", "one row"])
@pytest.mark.parametrize("given", [None, 0, 7], ids=str)
@pytest.mark.parametrize("family", ranks.HEADS)
def test_a_batch_without_labels_costs_nothing(family, given, labels):
    model, batch = sparse_model(family), ranks.whole_batch(family, "padded")
    batch["labels"][:] = -100
    if labels == "one row" and family == "llama":
        # nothing comes before the first token that could predict it
        batch["labels"][0, 0] = 5
    count = {} if given is None else {"num_items_in_batch": torch.tensor(given)}
    loss = model(**batch, **count).loss
    loss.backward()
    assert loss == 0 and not together(gradients(model)).any()
    # a mean of nothing, as in Transformers
    assert model.eval()(**batch).loss.isnan()


@pytest.mark.cross
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("family", "data"), CASES)
def test_checkpointing_changes_no_bit(family, data, reentrant):
    model, batch = sparse_model(family, dropout=0.2), ranks.whole_batch(family, data)

    def step():
        torch.manual_seed(5)
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), gradients(model)

    loss, wanted = step()
    # the newer name came with 5.24
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    again, found = step()
    assert loss == again and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
    torch.manual_seed(6)
    assert model(**batch).loss != loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "data"), CASES)
def test_half_precision_is_as_near_as_its_roundings(family, data, dtype):
    """Autocast, and for float16 a scaler that must find nothing to skip.

    Scores of masked pairs must not overflow.
    """
    model, batch = sparse_model(family), ranks.whole_batch(family, data)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=dtype == torch.float16)
    # a step of nothing, that leaves the gradients to look at
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype):
        loss = model(**batch, num_items_in_batch=ranks.count(family, batch)).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    before = scaler.get_scale()
    scaler.update()
    assert scaler.get_scale() == before
    wanted = ranks.expected(family, data)
    limit = 40 * torch.finfo(dtype).eps
    assert float(loss.detach()) == pytest.approx(float(wanted.pop("loss")), rel=limit)
    found, wanted = together(gradients(model)), together(wanted)
    assert found.isfinite().all() and (found - wanted).norm() <= limit * wanted.norm()


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "data"), sampled(FEW[:1], FEW))
def test_compiled_steps_train_what_eager_ones_do(family, data, backend):
    torch._dynamo.reset()
    trained = []
    for compiled in (False, True):
        model = sparse_model(family)
        run = torch.compile(model, backend=backend) if compiled else model
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        # rows of one step have other padding, documents and labels than those of the next
        for rows in range(0, ranks.ROWS, 4):
            batch = {name: value[rows : rows + 4] for name, value in ranks.whole_batch(family, data).items()}
            loss = run(**batch, num_items_in_batch=ranks.count(family, batch)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        trained.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (losses, weights), (compiled_losses, compiled_weights) = trained
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    # Adam takes the sign of gradients that are zero but for roundings
    torch.testing.assert_close(compiled_weights, weights, rtol=1e-4, atol=2.1e-3)
    assert ((compiled_weights - weights).abs() > 1e-5).float().mean() < 0.02


def test_masks_are_those_of_the_batch_and_the_epoch():
    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": tokenizer(example["text"]).input_ids} for example in tiny.texts(4)]
    collator = RepeatableCollator(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3), seed=1)
    torch.manual_seed(3)
    first, after = collator(rows), torch.rand(3)
    torch.manual_seed(4)
    collator(rows[:2])
    again = collator(rows)
    assert torch.equal(first["input_ids"], again["input_ids"]) and torch.equal(first["labels"], again["labels"])
    # what others draw is left to them
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)
    collator.on_epoch_begin(None, TrainerState(epoch=1.25), None)
    assert collator.epoch == 1 and not torch.equal(first["labels"], collator(rows)["labels"])
    other = RepeatableCollator(collator.inner, seed=2)
    assert not torch.equal(first["labels"], other(rows)["labels"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("run_mlm", [], id="mlm", marks=pytest.mark.slow),
        pytest.param("heal", ["--lora_rank", "4"], id="lora", marks=pytest.mark.slow),
        pytest.param("heal", ["--lora_rank", "4", "--distil"], id="lora distilled"),
    ],
)
def test_going_on_gives_what_not_stopping_gives(name, options, tmp_path):
    """Dropout (MLM has some) and masks included; into the second epoch."""
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    common = ["--tiny", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1", "--learning_rate", "3e-3"]
    common += ["--max_steps", "9", "--save_steps", "3", "--per_device_train_batch_size", "4", "--save_total_limit", "9"]

    def run(out: str, *more: str):
        with contextlib.redirect_stdout(None):
            metrics = main([*common, *options, "--output_dir", str(tmp_path / out), *more])
        state = json.loads((tmp_path / out / "checkpoint-9" / "trainer_state.json").read_text())
        assert state["epoch"] > 1
        losses = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
        return metrics, losses, (tmp_path / out / "model.safetensors").read_bytes()

    whole = run("whole")
    for step in (3, 6):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
        again = run(f"{step}", "--resume_from_checkpoint", "True")
        assert again[1] == whole[1] and len(again[1]) == 9
        assert again[2] == whole[2]
        assert {k: v for k, v in again[0].items() if "perplexity" in k} == {
            k: v for k, v in whole[0].items() if "perplexity" in k
        }
