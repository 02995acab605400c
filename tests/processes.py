"""Commands that start processes, and all that those said if they hang."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.fresh import HANG_S, ROOT, fresh

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def finished(*arguments: str) -> tuple[int, str]:
    """Exit status of `python arguments...` and what it said.

    A launcher that hangs is ended in a way that it ends its processes.
    """
    command, environment = [sys.executable, "-W", "ignore", *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=HANG_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            said, _ = process.communicate()
            raise AssertionError(f"{' '.join(command)} hung for {HANG_S} s and said:\n{said[-5000:]}") from None
    return process.returncode, said


def printed(code: str) -> str:
    """What Python code prints in an interpreter of its own."""
    status, said = fresh(code)
    assert status == 0, said
    return said.strip()
