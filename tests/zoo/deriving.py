"""What it costs to derive a family that is first met: seconds of CPU beyond importing Transformers' classes of it.

Each type is derived in a fork of a process that has met none. `python -m tests.zoo.deriving --every 8` takes every eighth type.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sparse_hf
from sparse_hf.bench import chosen_device, environment, result_path
from sparse_hf.models.derived.entry import dense_config_class
from sparse_hf.models.hf.register import FAMILIES, modeling_module

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def main(every: int, out: Path) -> None:
    torch.set_num_threads(1)
    rows = [_in_fork(name) for name in sparse_hf.derived_types()[::every]]
    found = sorted(row["derive_cpu_s"] for row in rows)
    print(f"{len(rows)} types: median {median(found):.2f} s, slowest {found[-1]:.2f} s")
    facts = environment(chosen_device("cpu"))
    content = {
        "benchmark": "deriving",
        "environment": facts,
        "note": "of each type, seconds of CPU that importing its modelling file takes, and then deriving its sparse classes",
        "rows": rows,
    }
    result_path(out, facts, "deriving").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _in_fork(name: str) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as pipe:
            json.dump(_costs(name), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        row = json.load(pipe)
    os.waitpid(child, 0)
    return row


def _costs(name: str) -> dict[str, Any]:
    begin = time.process_time()
    modeling_module(dense_config_class(name))
    imported = time.process_time()
    FAMILIES[name]
    return {"type": name, "import_cpu_s": imported - begin, "derive_cpu_s": time.process_time() - imported}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    main(**vars(parser.parse_args()))
