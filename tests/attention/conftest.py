"""What tests of several rooms of attention share."""

import pytest

from tests.attention.exactness import DEVICE


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels on the CPU too; tests/conftest.py has Triton interpret them there."""
    from sparse_hf.attention.backends.triton import walk

    monkeypatch.setattr(walk, "DEVICES", {DEVICE})
