"""Two processes that train a published architecture together; `test_reformer.py` compares.

Each case gives the norm of all gradients, and that of one process alone on the whole batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparse_hf
from sparse_hf.models.reformer.reversible import SparseReformerLayer
from tests.models import longformers, reformers
from tests.transformers.standins import run_distributed

CASES = {
    "reformer": (
        "ddp", "fsdp1", "fsdp1 original", "fsdp1 layers", "fsdp1 layers original", "fsdp2", "fsdp2 layers",
    ),
    "led": ("ddp",),
}  # fmt: skip


def reformer() -> torch.nn.Module:
    return sparse_hf.sparsify(reformers.stock_model("ReformerModelWithLMHead")).double().train()


def led() -> torch.nn.Module:
    return sparse_hf.sparsify(longformers.stock_model("LEDForConditionalGeneration")).double().train()


def is_layer(module: torch.nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    return recurse or isinstance(module, SparseReformerLayer)


def spread(model: torch.nn.Module, how: str) -> torch.nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how.startswith("fsdp2"):
        for layer in (m for m in model.modules() if isinstance(m, SparseReformerLayer) and "layers" in how):
            fully_shard(layer)
        return fully_shard(model)
    policy = is_layer if "layers" in how else None
    is_original = "original" in how
    return FullyShardedDataParallel(
        model, use_orig_params=is_original, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )


def norm(model: torch.nn.Module, how: str) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if how.startswith("fsdp2"):
        grads = [grad.full_tensor() for grad in grads]
    total = sum((grad.square().sum() for grad in grads), torch.zeros((), dtype=torch.float64))
    if how.startswith("fsdp1"):
        dist.all_reduce(total)
    return float(total.sqrt())


def halves(batch: dict, rank: int) -> dict:
    return {name: t[rank : rank + 1] for name, t in batch.items()}


def step(make, batch: dict, how: str) -> tuple[float, float]:
    """Norms of the gradients of both processes, and of one that has the whole batch."""
    alone = make()
    # the mean over processes of each one's loss
    (sum(alone(**halves(batch, rank)).loss for rank in range(2)) / 2).backward()
    model = spread(make(), how)
    for _ in range(2):
        # a second step finds out what a first one left unfinished
        model.zero_grad()
        model(**halves(batch, dist.get_rank())).loss.backward()
    return norm(model, how), norm(alone, "")


def _work(rank: int, folder: str) -> None:
    # the second row of LED has no marks
    marked = longformers.inputs("LEDForConditionalGeneration", 50, side="none", marks="few")
    marked["global_attention_mask"][1] = 0
    of = {"reformer": (reformer, reformers.inputs("ReformerModelWithLMHead", 60, "none")), "led": (led, marked)}
    found = {family: {how: step(*of[family], how) for how in ways} for family, ways in CASES.items()}
    torch.save(found, f"{folder}/{rank}.pt")


def steps(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """What the first process found, by family and by how it is spread."""
    run_distributed(2)(_work)(str(folder))
    return torch.load(folder / "0.pt", weights_only=True)
