"""What one step gives on ranks that share each text; `test_split_sequence.py` compares.

Four processes do all of it, in groups of two or of four.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import ParallelismConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import sparse_hf
from sparse_hf.train import SplitTrainer, long_text, split_sequence
from tests import oracle
from tests.models.families import additive, dense_model
from tests.models.longformers import stock_model
from tests.transformers.standins import run_distributed

WORLD, ROWS, LENGTH, LOWEST, VOCABULARY = 4, 3, 96, 4, 96
HEADS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "longformer": "LongformerForMaskedLM",
}
# row and column; stock Longformer has NaN in its gradients where rows have different numbers of them
MARKED = [(0, 0), (0, 61), (1, 40), (1, 55), (2, 20), (2, 21)]


class Cell(NamedTuple):
    """One step.

    Attributes:
        family, pattern: of the model; None is the family's own pattern.
        data: "plain", "left", "right" or "packed".
        ranks: that share a text.
        how: further words: "checkpoints", "long" (`long_text`), "fsdp2".
    """

    family: str
    pattern: str | None
    data: str
    ranks: int
    how: str = ""


DECODERS = [
    Cell("llama", "window(9, 0) | first(2)", data, ranks)
    for data, ranks in (("plain", 2), ("left", 4), ("right", 2), ("packed", 2), ("packed", 4))
]
ENCODERS = [
    Cell("bert", pattern, data, 4)
    for pattern in ("window(5, 4) | first(2)", "window(4, 4) | marked()")
    for data in ("right", "packed")
]
OTHERS = [
    # wider than a part
    Cell("llama", "window(40, 0) | first(1)", "packed", 4),
    Cell("llama", "chunk(8, 1) | first(3)", "left", 4, "checkpoints"),
    Cell("llama", "stride(6) | window(4, 0)", "packed", 4),
    Cell("llama", "per_head(" + ", ".join(f"window({3 * h}, 0) | first({h % 3})" for h in range(8)) + ")", "right", 2),
    Cell("gpt2", "window(6, 0) | marked()", "right", 4),
    Cell("roberta", "window(5, 5) | first(1)", "right", 2),
    Cell("bert", "window(4, 4) | first(1)", "packed", 2, "checkpoints long"),
    Cell("bert", "per_head(window(3, 3) | marked(), window(9, 1), fixed(6, 2), stride(3) | marked())", "right", 4),
    Cell("longformer", None, "plain", 2, "checkpoints"),
    Cell("longformer", None, "right", 4),
    Cell("llama", "window(9, 0) | first(2)", "right", 2, "fsdp2"),
    Cell("bert", "window(4, 4) | marked()", "right", 2, "fsdp2"),
]
CELLS = [*DECODERS, *ENCODERS, *OTHERS]


def uneven(length: int, ranks: int) -> list[int]:
    """Parts that differ: the first is the longest."""
    sizes = [length // ranks - 3] * ranks
    return [length - sum(sizes[1:]), *sizes[1:]]


def stock(family: str):
    """Transformers' model, in float64."""
    if family == "longformer":
        model = stock_model(HEADS[family]).double().train()
        # which Transformers leaves as the memory happens to be
        torch.nn.init.zeros_(model.lm_head.bias)
        return model
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4} if family == "llama" else {}
    return dense_model(HEADS[family], vocab_size=VOCABULARY, **heads).double().train()


def whole_batch(cell: Cell) -> dict[str, Tensor]:
    """Rows with different numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(LOWEST, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels, mask, marks = ids.clone(), torch.ones_like(ids), torch.zeros_like(ids)
    labels[1, :50] = -100
    for row, column in MARKED:
        marks[row, column] = 1
    batch = {"input_ids": ids, "labels": labels}
    if cell.data == "left":
        mask[1, :30], mask[2, :70] = 0, 0
    if cell.data == "right":
        mask[1, 60:], mask[2, 80:] = 0, 0
    if cell.data == "packed":
        # documents that end where parts do, and others that do not
        cuts = torch.tensor([[0, 20, 51], [0, 3, 4], [0, 30, 63]])
        begun = (torch.arange(LENGTH) >= cuts[..., None]).sum(1) - 1
        batch["position_ids"] = torch.arange(LENGTH) - cuts.gather(1, begun)
        labels[batch["position_ids"] == 0] = -100
    labels[mask == 0] = -100
    # what the padding in front would predict
    labels[:, 1:][mask[:, :-1] == 0] = -100
    if cell.data in ("left", "right"):
        batch |= {"attention_mask": mask, "input_ids": ids.masked_fill(mask == 0, 1)}
    if cell.family == "longformer" or "marked" in (cell.pattern or ""):
        batch["global_attention_mask"] = marks * mask
    return batch


def expected(cell: Cell) -> dict[str, Tensor]:
    """Loss and gradients of Transformers' model in one process; the pattern is its dense mask."""
    model, batch = stock(cell.family), whole_batch(cell)
    if cell.family != "longformer":
        assert cell.pattern is not None
        model.set_attn_implementation("sdpa")
        marks, real = batch.pop("global_attention_mask", None), batch.get("attention_mask")
        documents = (batch["position_ids"] == 0).cumsum(1) if cell.data == "packed" else None
        mask = oracle.dense_mask(cell.pattern, LENGTH, LENGTH, real, documents, marks)
        past = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if cell.family in ("llama", "gpt2") else True
        # padding that sees itself keeps the reference free of NaN, and nobody sees it
        mask = mask & past
        mask = mask | (~mask.any(-1, keepdim=True) & torch.eye(LENGTH, dtype=torch.bool))
        batch["attention_mask"] = additive(mask.expand(ROWS, -1, -1, -1), torch.float64)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def shared_step(cell: Cell, groups: dict[int, Any], device: str = "cpu") -> dict[str, Tensor]:
    """Loss and gradients as this rank has them after the step."""
    batch = {name: value.to(device) for name, value in whole_batch(cell).items()}
    model = sparse_hf.sparsify(stock(cell.family).to(device), cell.pattern)
    if "checkpoints" in cell.how:
        model.gradient_checkpointing_enable()
    if "long" in cell.how.split():
        long_text(model, logits=8, feed_forward=8, checkpoint_layers=False)
    if "fsdp2" in cell.how:
        for module in list(model.modules()):
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module)
        fully_shard(model)
    with split_sequence(model, groups[cell.ranks], parts=uneven) as handle:
        loss = model(**batch).loss
        loss.backward()
        if "fsdp2" not in cell.how:
            handle.average_gradients()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {name: value.cpu() for name, value in {"loss": loss.detach(), **whole}.items()}


def on_gpus(folder: str) -> None:
    """A rank of those that torchrun starts, a GPU each, which talk by NCCL: its steps, into a file."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)
    groups = {world: None}
    if world == WORLD:
        groups[2] = init_device_mesh("cuda", (2, 2), mesh_dim_names=("data", "text"))["text"]
    found = {tuple(cell): shared_step(cell, groups, str(device)) for cell in CELLS if cell.ranks in groups}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def bytes_of(length: int, pattern: str, family: str) -> int:
    """What this rank sends in one step on a text of a length."""
    model = sparse_hf.sparsify(dense_model(HEADS[family], vocab_size=VOCABULARY, max_position_embeddings=2048), pattern)
    ids = torch.randint(LOWEST, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    with split_sequence(model.train()) as handle:
        model(input_ids=ids, labels=ids).loss.backward()
        return handle.bytes_exchanged


def refusals() -> dict[str, str]:
    """What is said of what cannot be."""
    cases: dict[str, tuple[str, str, dict[str, Any]]] = {
        "lsh": ("LlamaForCausalLM", "window(4, 0) | lsh(8)", {}),
        "4-D": ("LlamaForCausalLM", "window(4, 0)", {"attention_mask": torch.zeros(ROWS, 1, LENGTH, LENGTH)}),
        "rows": ("BertForSequenceClassification", "window(4, 4)", {"labels": torch.zeros(ROWS, dtype=torch.long)}),
        "bias": ("BloomForCausalLM", "window(4, 0)", {}),
        "two texts": ("T5ForConditionalGeneration", "window(4, 4)", {}),
        "other texts": ("LlamaForCausalLM", "window(4, 0)", {}),
        "short": ("LlamaForCausalLM", "window(4, 0)", {"input_ids": torch.ones(1, 3, dtype=torch.long)}),
    }
    said, rank = {}, torch.distributed.get_rank()
    for name, (head, pattern, given) in cases.items():
        batch = {"input_ids": torch.full((ROWS, LENGTH), 7 + rank * (name == "other texts")), **given}
        try:
            model = sparse_hf.sparsify(dense_model(head, vocab_size=VOCABULARY), pattern)
            with split_sequence(model):
                model(**batch)
        except (ValueError, NotImplementedError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def trained(folder: str, shared: bool) -> dict[str, Any]:
    """Losses, norms of gradients and weights after three steps of a `SplitTrainer`, resumed after the second."""
    if shared:
        # accelerate takes it on devices alone, though nothing of it needs one
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    data = [{name: value[row % ROWS] for name, value in whole_batch(DECODERS[2]).items()} for row in range(4)]
    rows = 1 if shared else 2

    def trainer(pattern: str) -> SplitTrainer:
        # two processes share a text, and there are two such pairs
        config = {"parallelism_config": ParallelismConfig(cp_size=2, dp_shard_size=2)} if shared else {}
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_steps=2, max_steps=3,
            learning_rate=1e-2, train_sampling_strategy="sequential", per_device_train_batch_size=rows,
            per_device_eval_batch_size=rows, **config,
        )  # fmt: skip
        torch.manual_seed(0)
        model = sparse_hf.sparsify(dense_model(HEADS["llama"], vocab_size=VOCABULARY), pattern)
        return SplitTrainer(model, arguments, train_dataset=data, eval_dataset=data)

    def said(one: SplitTrainer) -> dict[str, Any]:
        history = [(entry["loss"], entry["grad_norm"]) for entry in one.state.log_history if "loss" in entry]
        assert one.model is not None
        weights = torch.cat([p.detach().flatten() for p in one.model.parameters()])
        return {"history": history, "eval_loss": one.evaluate()["eval_loss"], "weights": weights}

    first = trainer("window(9, 0) | first(2)")
    first.train()
    found = {"first": said(first), "bytes": first.split.bytes_exchanged if first.split else 0}
    again = trainer("window(9, 0) | first(2)")
    try:
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    except RuntimeError as error:
        # Transformers 5.17 has torch load the optimizer to "cpu:0", as accelerate calls processors, which torch does not know
        if "tagged with cpu:0" not in str(error):
            raise
        return found
    return found | {"again": said(again)}


def _leave(rank: int, folder: str) -> None:
    """The second process ends in the midst of a step; the first says what it was told."""
    transformers.logging.set_verbosity_error()
    model = sparse_hf.sparsify(stock("llama"), "window(4, 0)")
    batch = whole_batch(DECODERS[0])
    with split_sequence(model):
        model(**batch)
        if rank:
            os._exit(0)
        try:
            model(**batch)
        except RuntimeError as error:
            Path(folder, "said").write_text(str(error))
    # no barrier: there is nobody to wait for
    os._exit(0)


def left_alone(folder: Path) -> str:
    """What a process says whose other one has ended."""
    run_distributed(2)(_leave)(str(folder))
    return (folder / "said").read_text()


def _work(rank: int, cells: list[Cell], folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "text"))
    groups = {2: mesh["text"], 4: None}
    found: dict[Any, Any] = {tuple(cell): shared_step(cell, groups) for cell in cells}
    found["bytes"] = {
        (family, pattern): [bytes_of(length, pattern, family) for length in (256, 1024)]
        for family, pattern in (("llama", "window(15, 0) | first(2)"), ("bert", "window(8, 8) | first(1)"))
    }
    found |= {"refusals": refusals(), "trained": trained(f"{folder}/trained", shared=True)}
    torch.save(found, f"{folder}/{rank}.pt")


def steps(folder: Path) -> list[dict[Any, Any]]:
    """What every rank has."""
    run_distributed(WORLD)(_work)(CELLS, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


if __name__ == "__main__":
    on_gpus(sys.argv[1])
