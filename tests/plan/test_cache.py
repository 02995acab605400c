"""What is computed once: by whom, and what serves later calls."""

from __future__ import annotations

import threading

from sparse_hf import build_plan
from sparse_hf.plan import made_apart, remembered, tile_lists


def test_tables_may_be_made_by_another_thread():
    @remembered
    def maker(plan):
        return threading.get_ident()

    here = build_plan("window(3, 0)", 10)
    assert maker(here) == threading.get_ident()
    with made_apart(True):
        there = build_plan("window(3, 0)", 10)
        assert maker(there) == maker(there) != threading.get_ident()
        # what is made there asks for more without a thread of its own
        assert tile_lists.tile_lists(there, 32, 1, 1).by_query.lines == 1
    assert maker(build_plan("window(3, 0)", 10)) == threading.get_ident()
