"""Time and memory of calls: what stands behind every figure."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch._dynamo.exc import TorchDynamoException

from .results import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def chosen_device(device: str | None) -> torch.device:
    """The device of that name, by default the GPU if there is one.

    Raises:
        ValueError: a name that torch does not know, or a GPU that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; it must be 'cpu' or 'cuda'") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; figures are of 'cpu' or 'cuda'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}, and torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices; use 'cpu'"
        )
    return chosen


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; the known ones are {', '.join(DTYPES)}")


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timer:
    """Where calls run, how many of them a figure needs, and the seconds it may take."""

    device: torch.device
    repeats: int
    budget_s: float

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time of one call, after one that is not counted, since it may compile.

        No further call begins once the budget is spent. On a GPU it is the device's own time,
        between events, with caches that hold nothing of the call before.
        """
        work()
        synchronize(self.device)
        measure = partial(_event_time, device=self.device) if self.device.type == "cuda" else _clock_time
        begin, taken = time.perf_counter(), []
        while len(taken) < self.repeats and (not taken or time.perf_counter() - begin < self.budget_s):
            taken.append(measure(work))
        return statistics.median(taken)


def _clock_time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _event_time(work: Callable[[], object], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # more than the L2 cache of any GPU; writing it also gives the host time to queue what comes
    # next
    torch.empty(1 << 28, dtype=torch.int8, device=device).zero_()
    start.record()
    work()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3


# of Linux: what resets the peak of the resident set, and what tells it, see proc(5)
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(work: Callable[[], object], device: torch.device, before: int | None = None) -> int | None:
    """Highest memory during one call above what was held before, by default right before it.

    None where the system does not say.
    """
    held = used_bytes(device)
    before = held if before is None else before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif before is not None:
        CLEAR.write_text("5")
    work()
    if before is None:
        return None
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")) - before


def used_bytes(device: torch.device) -> int | None:
    """Memory that is held now; None where the system does not say."""
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not CLEAR.exists():
        return None
    # memory that earlier calls freed but the allocator kept would hide what the next one takes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def held_bytes(device: torch.device) -> int:
    """What a GPU's allocator holds and cannot give back.

    That is tensors, and what CUDA graphs keep for their next call.
    """
    if device.type != "cuda":
        return 0
    # what an earlier model left in cycles would go, and be counted, at any time
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def forget_compiled(device: torch.device) -> None:
    """Drop what was compiled, and memory that nothing holds."""
    torch._dynamo.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def why_not_run(row: Row, earlier: Sequence[Row], keys: Sequence[str], budget_s: float) -> str | None:
    """Why a row is not run; None if it is.

    One of its name failed at a shorter length, or took more than the budget for one of `keys`.
    """
    before = next((r for r in reversed(earlier) if r["name"] == row["name"]), None)
    if before is None:
        return None
    if before.get("failed"):
        return before["failed"]
    if max(before[key] or 0 for key in keys) > budget_s:
        return "not run: the length before took too long"
    return None


def measured(row: Row, work: Callable[[], Row], refusals: tuple[type[Exception], ...] = ()) -> Row:
    """`row` with the figures that `work` gives, or with the reason under "failed".

    What is out of memory or cannot be compiled has failed, and so has what raises one of
    `refusals`.
    """
    try:
        return {**row, **work()}
    except TorchDynamoException as error:
        return {**row, "failed": f"cannot be compiled: {str(error).splitlines()[0]}"}
    except (RuntimeError, *refusals) as error:
        # of the CPU's memory torch speaks in words alone
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return {**row, "failed": "out of memory"}
        if not isinstance(error, refusals):
            raise
        return {**row, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def print_row(row: Row, figures: Callable[[Row], str], console: Console) -> None:
    """Print a line about a row where nobody watches a screen.

    It has the row's `figures`, or says why there are none.
    """
    if not console.is_terminal:
        line = f"{row['name']}, n = {row['n']:,}: {row.get('failed') or figures(row)}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
