"""What a token of `generate` is made of: kernels by name, and what the host does beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .clock import SETTLING, Clock
from .measure import synchronize
from .results import Row

# times that tokens come while a profiler looks on, and entries that are listed
PROFILED, LISTED = 16, 16
# what a kernel is for, by what its name has; the first that fits
GROUPS = {
    "attention": re.compile(r"flash|fmha|attention|softmax|^(split|join)$", re.IGNORECASE),
    "weights": re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk|_mm_|addmm|^aten::(mm|linear)$", re.IGNORECASE),
    "copies": re.compile(r"memcpy|memset|catarray|direct_copy|^aten::(cat|copy_)$", re.IGNORECASE),
}
OTHERS = "others"


def prepare_profiler(device: torch.device) -> None:
    """Have a GPU's kernels be seen that run in graphs: what looks at them must be there before a graph is, and stay."""
    if device.type == "cuda":
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        with profile(activities=_activities(device)):
            torch.ones(1, device=device).add_(1)
            synchronize(device)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


class ProfilingClock(Clock):
    """A clock whose tokens are looked at once they have settled. Its times are those of a run that is watched."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.profiler = device, profile(activities=_activities(device))
        self.is_on, self.seen, self.passes = False, 0, 0

    def put(self, value: Tensor) -> None:
        super().put(value)
        if self.is_on:
            self.seen += self.counts[-1]
            self.passes += 1
        if len(self.times) == SETTLING + 2:
            synchronize(self.device)
            self.profiler.start()
            self.is_on = True
        elif self.is_on and self.passes == PROFILED:
            self.stop()

    def end(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Look no longer."""
        if self.is_on:
            synchronize(self.device)
            self.profiler.stop()
            self.is_on = False

    def figures(self) -> Row:
        """What was seen, a token.

        `device_s` and `kernels` are of the device: its time in kernels, and their number; `groups` says what they are for. `host`
        has calls of the host by the time in themselves, `operations` the number of PyTorch's. On a CPU operations are kernels.
        """
        averages = [entry for entry in self.profiler.key_averages() if not _is_note(entry)]
        on_gpu = self.device.type == "cuda"
        device = [e for e in averages if (e.device_type.name == "CUDA") == on_gpu]
        host = [e for e in averages if e.device_type.name == "CPU"]
        kernels = _entries(device, "self_device_time_total" if on_gpu else "self_cpu_time_total", self.seen)
        calls = _entries(host, "self_cpu_time_total", self.seen)
        groups: dict[str, float] = {}
        for row in kernels:
            groups[group_of(row["name"])] = groups.get(group_of(row["name"]), 0.0) + row["s"]
        return {
            "tokens": self.seen,
            "passes": self.passes,
            "device_s": sum(row["s"] for row in kernels),
            "kernels": sum(row["calls"] for row in kernels),
            "groups": groups,
            "by_name": kernels[:LISTED],
            "operations": sum(row["calls"] for row in calls if row["name"].startswith("aten::")),
            "host": calls[:LISTED] if on_gpu else [],
        }


def _is_note(entry: Any) -> bool:
    """Is it a range that somebody named, which holds what is counted already?"""
    return bool(getattr(entry, "is_user_annotation", False)) or entry.key.startswith(("##", "ProfilerStep"))


def _entries(found: Iterable[Any], time: str, tokens: int) -> list[Row]:
    rows = [
        {"name": entry.key, "s": getattr(entry, time) / 1e6 / tokens, "calls": entry.count / tokens} for entry in found
    ]
    return sorted(rows, key=lambda row: -row["s"])


def group_of(kernel: str) -> str:
    """What a kernel is for.

    Examples:
        >>> group_of("split"), group_of("nvjet_tst_64x8_64x16_4x1_v_bz_TNT"), group_of("triton_poi_fused_add_cat_0")
        ('attention', 'weights', 'others')
    """
    return next((name for name, says in GROUPS.items() if says.search(kernel)), OTHERS)
