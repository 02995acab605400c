"""Result files: what a run was made on, its file's name, and how figures grow."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# what a benchmark measured: its settings, the machine, and a dictionary of figures for each row
Result = dict[str, Any]
Row = dict[str, Any]

PACKAGES = ("torch", "transformers", "triton", "flash-attn-4", "fla-core", "lsg-converter", "sparse-hf")
BRANDS = {"NVIDIA", "AMD", "Intel(R)", "Instinct", "GeForce", "Tesla", "Quadro"}


def environment(device: torch.device) -> dict[str, Any]:
    """Date, hardware and versions, and settings of the C library's memory."""
    versions = {}
    for name in PACKAGES:
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


def machine_name(hardware: str) -> str:
    """The folder of a machine's results: h200, cpu-2-cores."""
    cores = re.search(r", (\d+) cores$", hardware)
    if cores:
        return f"cpu-{cores[1]}-cores"
    words = [word for word in hardware.split() if word not in BRANDS]
    # the model is the first word with a digit, and a series may stand before it: RTX 4090
    last = next((i for i, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    series = [word.partition("-")[0] for word in words[: last + 1]]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(series).lower()).strip("-")


def result_path(out: str | Path, environment: dict[str, Any], suite: str) -> Path:
    """`out` if it ends in .json; else it is a folder, and the file `<machine>/<date>-<suite>.json` in it."""
    out = Path(out)
    if out.suffix == ".json":
        return out
    return out / machine_name(environment["hardware"]) / f"{environment['date']}-{suite}.json"


def latest_result(folder: str | Path, environment: dict[str, Any], suite: str) -> Path | None:
    """The newest result of a suite that this machine has in `folder`."""
    name = re.compile(rf"\d{{4}}-\d\d-\d\d-{re.escape(suite)}\.json")
    found = (Path(folder) / machine_name(environment["hardware"])).glob("*.json")
    return max((path for path in found if name.fullmatch(path.name)), default=None)


def write_json(result: Result, path: str | Path) -> None:
    """Write beside the target and rename, so that a file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def slopes(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """`slope` of each of `keys`, by the names of rows."""
    found = {}
    for name in dict.fromkeys(r["name"] for r in rows):
        measured = [r for r in rows if r["name"] == name and not r.get("failed")]
        found[name] = {key: slope([r["n"] for r in measured], [r[key] or 0 for r in measured]) for key in keys}
    return found


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Exponent of the power law through the points: least squares in logarithms."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if v and v > 0]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (statistics.mean(axis) for axis in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
