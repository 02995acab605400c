"""A global batch that processes share, and what one step on it gives on each.

`test_distributed.py` compares.

Every rank writes the loss and all gradients that it ends up with, whole, whatever way its share was
spread over the ranks.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import sparse_hf
from sparse_hf.train import HealingTrainer
from tests import oracle
from tests.models.families import additive, dense_model
from tests.models.longformers import stock_model
from tests.transformers.standins import run_distributed

ROWS, LENGTH, LOWEST, VOCABULARY = 8, 48, 4, 96
SPARSE = {
    "bert": "per_head(window(3, 3) | marked(), window(9, 1), first(2) | window(1, 1), stride(3) | marked())",
    "llama": f"per_head({', '.join(f'window({2 * head}, 0) | first({head % 3})' for head in range(8))})",
    # two windows of its own, and marks with projections of their own
    "longformer": None,
}
HEADS = {"bert": "BertForMaskedLM", "llama": "LlamaForCausalLM", "longformer": "LongformerForMaskedLM"}
WAYS = ("ddp", "fsdp2", "tp")
DATA = {"bert": ("padded", "packed"), "llama": ("padded", "packed"), "longformer": ("padded",)}
CELLS = [(family, way, data) for family in HEADS for way in WAYS for data in DATA[family]]
# modules of an encoder's layer -> how tensor parallelism spreads them; Transformers has plans for
# decoders only
ENCODER_PLAN = {
    **{f"attention.self.{name}": "colwise" for name in ("query", "key", "value")},
    "attention.output.dense": "rowwise",
    "intermediate.dense": "colwise",
    "output.dense": "rowwise",
}
GLOBAL_PLAN = {f"attention.self.{name}_global": "colwise" for name in ("query", "key", "value")}


def stock(family: str):
    """Transformers' model, in float64."""
    if family == "longformer":
        model = stock_model(HEADS[family])
    else:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4} if family == "llama" else {}
        # older versions split an output layer evenly only
        model = dense_model(HEADS[family], vocab_size=VOCABULARY, **heads)
    return model.double().train()


def whole_batch(family: str, data: str) -> dict[str, Tensor]:
    """Rows with different numbers of labels; of padded ones the second half has none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(LOWEST, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels, marks = ids.clone(), torch.zeros_like(ids)
    marks[:, [0, 20]] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for row in range(ROWS):
        labels[row, : [0, 30, 5, 46][row % 4]] = -100
        if data == "padded":
            batch["attention_mask"][row, LENGTH - 5 * (row % 3) :] = 0
    if data == "packed":
        # three documents to a row, cut elsewhere in every row
        cuts = torch.tensor([[0, 9 + row, 25 + 2 * row] for row in range(ROWS)])
        begun = (torch.arange(LENGTH) >= cuts[..., None]).sum(1) - 1
        batch["position_ids"] = torch.arange(LENGTH) - cuts.gather(1, begun)
        # what the last token of a document would predict
        labels[batch["position_ids"] == 0] = -100
    else:
        labels[ROWS // 2 :] = -100
        labels[batch["attention_mask"] == 0] = -100
    batch["labels"] = labels
    return batch | ({"global_attention_mask": marks * batch["attention_mask"]} if family != "llama" else {})


def count(family: str, batch: dict[str, Tensor]) -> Tensor:
    """Labels of the step."""
    return ((batch["labels"][:, 1:] if family == "llama" else batch["labels"]) != -100).sum()


def expected(family: str, data: str) -> dict[str, Tensor]:
    """Loss and gradients of Transformers' model in one process, on the whole batch.

    The pattern is its dense mask.
    """
    model, batch = stock(family), whole_batch(family, data)
    if family != "longformer":
        model.set_attn_implementation("sdpa")
        marks, real = batch.pop("global_attention_mask", None), batch["attention_mask"]
        documents = (batch["position_ids"] == 0).cumsum(1) if data == "packed" else None
        mask = oracle.dense_mask(SPARSE[family], LENGTH, LENGTH, real, documents, marks)
        past = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if family == "llama" else True
        batch["attention_mask"] = additive(mask & past, torch.float64)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def shared_step(family: str, way: str, data: str, folder: str) -> dict[str, Tensor]:
    """Loss and gradients as this rank has them after the step."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    batch = whole_batch(family, data)
    tokens = count(family, batch)
    if way != "tp":
        batch = {name: value.tensor_split(world)[rank] for name, value in batch.items()}
    model = spread(family, way, folder)
    loss = model(**batch, num_items_in_batch=tokens).loss
    # gradients are averaged over ranks that saw different rows
    (loss if way == "tp" else loss * world).backward()
    loss = loss.detach()
    if way != "tp":
        torch.distributed.all_reduce(loss)
    model = model.module if way == "ddp" else model
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {"loss": loss, **whole, "sharded": torch.tensor(sum(isinstance(g, DTensor) for g in grads.values()))}


def spread(family: str, way: str, folder: str):
    """A sparse model that the ranks share."""
    if way == "tp":
        auto = getattr(transformers, "AutoModelForCausalLM" if family == "llama" else "AutoModelForMaskedLM")
        parts = ENCODER_PLAN | (GLOBAL_PLAN if family == "longformer" else {})
        plan = None if family == "llama" else {f"{family}.encoder.layer.*.{name}": how for name, how in parts.items()}
        config = DistributedConfig(tp_size=torch.distributed.get_world_size(), tp_plan=plan)
        return auto.from_pretrained(f"{folder}/{family}", dtype=torch.float64, distributed_config=config).train()
    model = sparse_hf.sparsify(stock(family), SPARSE[family])
    if way == "ddp":
        return DistributedDataParallel(model)
    # as accelerate does, layer by layer and then what is left
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module)
    fully_shard(model)
    return model


def perplexity(folder: str, rows: int = 5) -> dict[str, float]:
    """What `HealingTrainer` says of rows that two processes cannot share evenly."""
    model, batch = sparse_hf.sparsify(stock("llama"), SPARSE["llama"]), whole_batch("llama", "packed")
    arguments = TrainingArguments(
        output_dir=folder, per_device_eval_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    data = [{name: value[row] for name, value in batch.items()} for row in range(rows)]
    metrics = HealingTrainer(model, arguments, eval_dataset=data, edges=(8,)).evaluate()
    return {name: value for name, value in metrics.items() if "perplexity" in name}


def received_teacher(folder: str) -> dict[str, Tensor]:
    """The teacher's weights in this rank, where FSDP lets the first one load models."""
    student = sparse_hf.sparsify(stock("llama").float(), SPARSE["llama"])
    arguments = TrainingArguments(output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True)
    # on a CPU accelerate has no FSDP, whose variables it reads here
    trainer = HealingTrainer(student, arguments)
    # as a launcher sets them
    efficient = dict.fromkeys(("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"), "true")
    before = dict(os.environ)
    os.environ |= efficient
    try:
        teacher = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/teacher")
        teacher = trainer.prepared(teacher)
    finally:
        os.environ.clear()
        os.environ |= before
    assert isinstance(teacher, sparse_hf.SparseMixin)
    ids = whole_batch("llama", "padded")["input_ids"]
    with torch.no_grad():
        return {**teacher.state_dict(), "answers": teacher(input_ids=ids).logits}


def _work(rank: int, cells: list[tuple[str, str, str]], folder: str) -> None:
    # of no use with a store in a file, but accelerate asks for them
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    transformers.logging.set_verbosity_error()
    found = {cell: shared_step(*cell, folder) for cell in cells}
    found |= {"perplexity": perplexity(folder), "teacher": received_teacher(folder)}
    torch.save(found, f"{folder}/{rank}.pt")


def steps(world: int, folder: Path) -> list[dict[tuple[str, str, str], dict[str, Tensor]]]:
    """What every rank has after each cell."""
    for family in HEADS:
        sparse_hf.sparsify(stock(family), SPARSE[family]).save_pretrained(folder / family)
    stock("llama").float().save_pretrained(folder / "teacher")
    run_distributed(world)(_work)(CELLS, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
