"""The complement of a pattern."""

from __future__ import annotations

import torch
from hypothesis import given

from sparse_hf import Outside
from tests.pattern.drawn import law, pairs, patterns


@law
@given(patterns, patterns)
def test_outside_is_the_complement(a, b):
    assert torch.equal(pairs(Outside(a)), ~pairs(a))
    assert torch.equal(pairs(Outside(a | b)), pairs(Outside(a) & Outside(b)))
