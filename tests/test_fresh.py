"""Interpreters that fork are as those that are started."""

from __future__ import annotations

import signal

import pytest

from tests.fresh import ROOT, fresh
from tests.processes import finished

SAYS = """
import os, sys
print(sys.argv, __name__, sys.path[0] == "", os.getcwd(), sys.stdin.read(), sys.warnoptions, os.environ["OMP_NUM_THREADS"])
print([name for name in ("transformers", "sparse_hf", "huggingface_hub", "tests") if name in sys.modules])
print("wrong", file=sys.stderr)
"""


def test_it_sees_what_a_started_one_sees():
    status, said = fresh(SAYS, "one", "two")
    assert status == 0 and sorted(said.splitlines()) == sorted(finished("-c", SAYS, "one", "two")[1].splitlines())


def test_nothing_of_one_is_left_to_the_next(tmp_path):
    code = "import os, sys; print(os.environ.get('KEPT'), os.getcwd(), hasattr(sys, 'kept')); sys.kept = 1"
    first = fresh(code, cwd=tmp_path, environment={"KEPT": "yes"})
    assert first == (0, f"yes {tmp_path} False\n")
    assert fresh(code) == (0, f"None {ROOT} False\n")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_failures_are_told(code, status, message):
    found, said = fresh(code)
    assert found == status and message in said
    # and the next one runs
    assert fresh("print(1)") == (0, "1\n")
