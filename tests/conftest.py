"""What every test runs under."""

import gc
import os

import pytest
import torch
from transformers.utils import logging

from tests.crosses import mark_rest
from tests.garbage import keep_libraries

if not torch.cuda.is_available():
    # read when triton is imported, which nothing has done yet
    os.environ["TRITON_INTERPRET"] = "1"
# as many processes as cores run side by side
torch.set_num_threads(1)
logging.set_verbosity_error()


# what is collected stays, and a search for garbage would look at all of it, again and again
@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


# before cases are chosen by their markers
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    mark_rest(items)


@pytest.fixture(autouse=True)
def _libraries_stay():
    keep_libraries()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """Tests change what plans and decisions are made of; none goes on with those of another."""
    from sparse_hf.plan.lookup import forget_plans

    forget_plans()


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels on the CPU too, in its interpreter."""
    from sparse_hf.attention.backends.triton import walk

    has_gpu = torch.cuda.is_available()
    monkeypatch.setattr(walk, "DEVICES", {"cuda" if has_gpu else "cpu"})
    if not has_gpu:
        from triton.runtime import interpreter

        from tests.interpreter import once_a_kernel

        monkeypatch.setattr(interpreter, "_patch_lang", once_a_kernel(interpreter._patch_lang))
