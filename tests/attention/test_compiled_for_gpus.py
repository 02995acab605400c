"""Triton's compiler takes what its interpreter does not care about; a GPU is not needed to ask it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled_for_gpus.py")
ROOT = SCRIPT.parent.parent.parent
ROOMS = (
    "backends.triton.kernels", "chosen.kernels", "chosen.block_kernels", "chosen.selection_kernels", "chosen.latent_kernels",
    "slots.kernels",
    "backends.flash.column_kernels", "composite.global_token_kernels",
    "composite.chosen_list_kernels", "composite.chosen_threshold_kernels",
    "composite.chosen_block_kernels",
)  # fmt: skip


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_compile_for_an_h100(tmp_path):
    own = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, SCRIPT], env={**os.environ, **own}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for room in ROOMS:
        assert f"attention.{room}." in run.stdout
