"""One pattern per head."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparse_hf import Pattern, PerHead
from tests.pattern.drawn import law, patterns


@law
@given(st.lists(patterns, min_size=1, max_size=3))
def test_text_form_of_heads_round_trips(heads):
    pattern = PerHead(*heads)
    assert Pattern.parse(str(pattern)) == pattern and pattern.heads == tuple(heads)
