"""One process of `sparse-hf bench sequence`, of those that torchrun starts: cases one after the other.

`python -m torch.distributed.run ... -m sparse_hf.bench.sequence_worker FOLDER` reads cases.json, appends a line to rows.jsonl for each
that is done, and says in a file of its rank what ended it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..train import SplitSequence, long_text, plan_memory, split_sequence
from .measure import DTYPES, peak_bytes, synchronize
from .results import Row
from .ring import NAME, register_ring, ring_step
from .training import dense_model, distance, gradients, make_batch, masked_step, sparse_model, training_step

# tokens of each process in the step before those that are timed, in which kernels are compiled
WARM_TOKENS = 65536
# how far gradients in float32 may be from the dense model's, and how many times as far as one process in bf16
EXACT_DISTANCE, TIMES_AS_FAR = 1e-4, 1.5


def exact(case: Row, device: torch.device) -> Row:
    """Gradients of all processes, and of one, beside those of the dense model in float32 that has the pattern as its mask."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shape, dtype, n = case["shape"], case["dtype"], case["n"]

    def gradients_of(shared: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model = sparse_model(shape, n, dtype, device, case["pattern"])
        batch = make_batch(model, n, device)
        if not shared:
            return float(training_step(model, batch)), gradients(model)
        if case["fsdp"]:
            long_text(model, logits=n // 16, feed_forward=n // 16)
            _shard(model, mesh)
        with split_sequence(model, mesh) as handle:
            loss = float(training_step(model, batch))
            if not case["fsdp"]:
                handle.average_gradients()
        return loss, gradients(model)

    dense = dense_model(shape, n, "fp32", device, attn_implementation="sdpa")
    masked_step(dense, make_batch(dense, n, device), case["pattern"])
    whole = gradients(dense)
    (loss, found), (loss_of_one, alone) = gradients_of(shared=True), gradients_of(shared=False)
    far, of_one = _worst(distance(found, whole), device), distance(alone, whole)
    row = {"loss": loss, "loss_of_one": loss_of_one, "gradient_distance": far, "gradient_distance_of_one": of_one}
    limit = max(EXACT_DISTANCE, TIMES_AS_FAR * of_one if dtype != "fp32" else 0)
    return row if far <= limit else {**row, "failed": f"wrong: gradients are {far:.2e} from the dense model's"}


def step(case: Row, device: torch.device) -> Row:
    """A training step of texts that are split, over a mesh of data and text."""
    texts = case["gpus"] // case["data"]
    mesh = init_device_mesh(device.type, (case["data"], texts), mesh_dim_names=("data", "text"))
    model = sparse_model(case["shape"], case["n"], case["dtype"], device, case["pattern"])
    long_text(model, offload=case["offload"])
    if case["fsdp"]:
        _shard(model, init_device_mesh(device.type, (case["gpus"],)))
    handle = split_sequence(model, mesh["text"]) if texts > 1 else None

    # each row of the mesh has a text of its own
    warm, batch = (
        make_batch(model, n, device, seed=mesh["data"].get_local_rank())
        for n in (min(case["n"], WARM_TOKENS * texts), case["n"])
    )
    averages = None if case["fsdp"] else handle
    _step(model, warm, averages)
    before = handle.bytes_exchanged if handle else 0
    row = _timed(partial(_step, model, batch, averages), case, device)
    sent = (handle.bytes_exchanged - before if handle else 0) / case["steps"]
    if case["data"] == 1:
        how = {"gpus": texts, "split": texts > 1, "fsdp": case["fsdp"], "optimizer": "none"}
        how["way"] = "offload" if case["offload"] else "long_text"
        row["planned_bytes"] = plan_memory(model, case["n"], dtype=DTYPES[case["dtype"]], **how).peak
    row["bytes_a_layer"] = round(_worst(sent, device) / model.config.num_hidden_layers)
    return row


def ring(case: Row, device: torch.device) -> Row:
    """The same step of the dense model in torch's ring."""
    if device.type == "cpu":
        raise ValueError("torch's ring has no attention for CPUs")
    mesh = init_device_mesh(device.type, (case["gpus"],))
    register_ring()
    model = dense_model(case["shape"], case["n"], case["dtype"], device, attn_implementation=NAME)
    long_text(model)
    warm, batch = (make_batch(model, n, device) for n in (min(case["n"], WARM_TOKENS), case["n"]))
    ring_step(model, warm, mesh, case["kernel"], case["rotation"])
    return _timed(partial(ring_step, model, batch, mesh, case["kernel"], case["rotation"]), case, device)


WORK: dict[str, Callable[[Row, torch.device], Row]] = {"exact": exact, "step": step, "ring": ring}


def _step(model: Any, batch: dict[str, torch.Tensor], handle: SplitSequence | None) -> torch.Tensor:
    loss = training_step(model, batch)
    if handle is not None:
        handle.average_gradients()
    return loss


def _shard(model: Any, mesh: DeviceMesh) -> None:
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _timed(work: Callable[[], torch.Tensor], case: Row, device: torch.device) -> Row:
    """Seconds of the slowest process, of the median step; what the fullest holds at most."""
    taken, peaks, losses = [], [], []
    retries = _allocation_retries(device)
    for _ in range(case["steps"]):
        synchronize(device)
        dist.barrier()
        begin = time.perf_counter()
        peaks.append(peak_bytes(lambda: losses.append(float(work())), device, before=0) or 0)
        synchronize(device)
        taken.append(_worst(time.perf_counter() - begin, device))
    seconds = statistics.median(taken)
    tokens = case["n"] * case.get("data", 1)
    peak = int(_worst(max(peaks), device))
    row = {"seconds": seconds, "tokens_per_s": tokens / seconds, "peak_bytes": peak, "loss": losses[-1]}
    if retries is not None:
        row["allocation_retries"] = int(_worst((_allocation_retries(device) or 0) - retries, device))
    return row


def _allocation_retries(device: torch.device) -> int | None:
    """How often torch gave back all memory that it kept and asked again, which takes seconds; None on a CPU."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else None


def _worst(value: float, device: torch.device) -> float:
    """The greatest of all processes."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def main(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    is_gpu = cases[0]["device"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_gpu else torch.device("cpu")
    logging.set_verbosity_error()
    try:
        if is_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device if is_gpu else None)
        for case in cases:
            row = WORK[case["work"]](case, device)
            if rank == 0:
                with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            gc.collect()
            if is_gpu:
                torch.cuda.empty_cache()
    except Exception as error:
        # whatever it is, it is this case's row, and the processes end together
        said = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
        (folder / f"error-{rank}.txt").write_text(said, encoding="utf-8")
        raise
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
