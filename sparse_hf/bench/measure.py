"""Time, memory, correctness and the facts that a figure is worth nothing without."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..plan import BlockPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEERS = ("flash-attn-4", "fla-core", "lsg-converter")
VERSIONS = ("torch", "transformers", "triton", *PEERS, "sparse-hf")


def environment(device: torch.device) -> dict:
    """Hardware and versions, and how the C library was told to hand out memory, if it was."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        **{name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor()}, {os.cpu_count()} cores"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], None], device: torch.device, repeats: int, budget: float) -> float:
    """Median time of one call, after one that is not counted (it may compile); no more once `budget` seconds are spent.

    On a GPU it is the device's own time, between events, with caches that hold nothing of the call before.
    """
    work()
    synchronize(device)
    measure = partial(_event_time, device=device) if device.type == "cuda" else _clock_time
    begin, taken = time.perf_counter(), []
    while len(taken) < repeats and (not taken or time.perf_counter() - begin < budget):
        taken.append(measure(work))
    return statistics.median(taken)


def seconds_in_turn(works: Sequence[Callable[[], None]], repeats: int, budget: float) -> list[float]:
    """Median times of a call of each, by the clock; all have a turn before one has its next, which none has once `budget` is spent."""
    begin, taken = time.perf_counter(), [[] for _ in works]
    for turn in range(repeats):
        if turn and time.perf_counter() - begin > budget:
            break
        for work, times in zip(works, taken, strict=True):
            times.append(_clock_time(work))
    return [statistics.median(times) for times in taken]


def _clock_time(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _event_time(work: Callable[[], None], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # more than the L2 cache of any GPU; writing it also gives the host time to queue what comes next
    torch.empty(1 << 28, dtype=torch.int8, device=device).zero_()
    start.record()
    work()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3


def peak_bytes(work: Callable[[], None], device: torch.device) -> int | None:
    """Highest memory during one call above what was held before it; None where the system does not tell."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        work()
        return None
    # memory that earlier calls freed but the allocator kept would hide what this one takes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # 5 resets the peak of the resident set, see proc(5)
    clear.write_text("5")
    before = _status(status, "VmRSS")
    work()
    return _status(status, "VmHWM") - before


def held_bytes(device: torch.device) -> int:
    """What a GPU's allocator holds and cannot give back: tensors, and what CUDA graphs keep for their next call."""
    if device.type != "cuda":
        return 0
    # what an earlier model left in cycles would go, and be counted, at any time
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _status(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measured(
    row: dict,
    work: Callable[[], dict],
    earlier: list[dict],
    keys: Sequence[str],
    budget: float,
    refusals: tuple[type[Exception], ...] = (),
) -> dict:
    """`row` with the figures that `work` gives, or under "failed" with what kept it from them.

    A row of `earlier` of the same name that failed, or of whose `keys` one took more than `budget` seconds, ends that name's rows.
    What is out of memory or cannot be compiled has failed, and so has what raises one of `refusals`.
    """
    before = next((r for r in reversed(earlier) if r["name"] == row["name"]), None)
    if before and before.get("failed"):
        return {**row, "failed": before["failed"]}
    if before and max(before[key] or 0 for key in keys) > budget:
        return {**row, "failed": "not run: the length before took too long"}
    try:
        return {**row, **work()}
    except torch._dynamo.exc.TorchDynamoException as error:
        return {**row, "failed": f"cannot be compiled: {str(error).splitlines()[0]}"}
    except (RuntimeError, *refusals) as error:
        # of the CPU's memory torch speaks in words alone
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return {**row, "failed": "out of memory"}
        if not isinstance(error, refusals):
            raise
        return {**row, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def tell(row: dict, told: Callable[[dict], str], console: Console) -> None:
    """A line about a row where nobody watches a screen: what `told` says of its figures, or why there are none."""
    if not console.is_terminal:
        line = f"{row['name']}, n = {row['n']:,}: {row.get('failed') or told(row)}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def slopes(rows: list[dict], keys: Sequence[str]) -> dict[str, dict]:
    """`slope` of each of `keys`, by the names of rows."""
    found = {}
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name and not r.get("failed")]
        found[name] = {key: slope([r["n"] for r in mine], [r[key] or 0 for r in mine]) for key in keys}
    return found


def slope(lengths: list[int], values: list[float]) -> float | None:
    """Exponent of the power law through the points: least squares in logarithms."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if v and v > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (statistics.mean(axis) for axis in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def row_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: BlockPlan,
    grad_out: Tensor,
    grad_q: Tensor | None,
    rows: int = 64,
) -> tuple[float, float | None]:
    """Largest relative errors of `rows` random rows of output and gradient of q (None: of none), against dense attention in float64.

    q is `[1, H, n, D]`, k and v `[1, G, n, D]`, of one sequence; of the plan no table is read, but pairs are asked for one by one.
    """
    chosen = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(0))[:rows].sort().values.to(q.device)
    keys, row = torch.arange(k.shape[2], device=q.device)[None, :], torch.zeros(1, 1, dtype=torch.long, device=q.device)
    masks = [plan.allows(row, p, chosen[:, None], keys) for p in range(len(plan.patterns))]
    repeats, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    found = []
    # head by head, so that the rows of one head are all that exists in float64
    for h in range(q.shape[1]):
        key, value = (t[0, h // repeats].detach().double() for t in (k, v))
        query, grad = (t[0, h, chosen].detach().double() for t in (q, grad_out))
        mask = masks[plan.heads[h] if plan.heads else 0]
        # a query without keys gives zeros, as ours do
        weights = (query @ key.T * scale).masked_fill(~mask, -torch.inf).softmax(-1).where(mask, 0.0)
        exact = weights @ value
        change = weights * (grad @ value.T - (grad * exact).sum(-1, keepdim=True))
        beside = ((out, exact), (grad_q, change @ key * scale))[: 1 if grad_q is None else 2]
        found.append([(got[0, h, chosen].detach().double() - right).norm() / right.norm() for got, right in beside])
    # torch's maximum is NaN where any is; Python's is not
    worst = [float(torch.stack(errors).max()) for errors in zip(*found, strict=True)]
    return worst[0], None if grad_q is None else worst[1]


def write_json(result: dict, path: str | Path) -> None:
    """Write beside the target and rename, so that a file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
