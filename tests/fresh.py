"""Fresh interpreters, which fork from one that has imported what Transformers imports, and neither Transformers nor sparse_hf.

Importing torch anew takes longer than most of what is asked of a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
# what does not end is ended after so long; nothing that works comes near it, however slow or busy a
# machine is
HANG_S = 1800
# large, and nothing in them is read from what a test sets
LIBRARIES = ("torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "scipy.stats", "PIL.Image")


def fresh(
    code: str, *arguments: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status of `python -W ignore -c code arguments...` and what it said; `environment` is added to this process's."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        asked = {"code": code, "arguments": arguments, "cwd": str(cwd), "environment": variables, "said": str(said)}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        ready, _, _ = select.select([server.stdout], [], [], HANG_S)
        status = server.stdout.readline() if ready else ""
        if not status:
            _server.cache_clear()
            os.killpg(server.pid, 9)
            raise AssertionError(
                f"{code} hung for {HANG_S} s or ended its server, and said:\n{said.read_text()[-5000:]}"
            )
        return int(status), said.read_text()


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    # it ends by itself where this process ends in another way, as nothing more can come
    atexit.register(server.kill)
    return server


def _serve() -> dict[str, Any] | None:
    """Fork for each line: gives what is asked in a process that forked, and nothing at the end."""
    # the folder of this file has modules that are named as others are
    del sys.path[0]
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    known = [name for name in ("transformers", "sparse_hf", "huggingface_hub") if name in sys.modules]
    assert not known, f"{known} are there before a test imports them"
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(asked: dict[str, Any]) -> None:
    """Run code as an interpreter does that was started for it."""
    said, nothing = os.open(asked["said"], os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(new, old)
    os.environ.clear()
    os.environ |= asked["environment"]
    os.chdir(asked["cwd"])
    sys.path.insert(0, "")
    sys.argv[:] = ["-c", *asked["arguments"]]
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(asked["code"], "<string>", "exec"), vars(main))


if __name__ == "__main__":
    asked = _serve()
    if asked is not None:
        _become(asked)
