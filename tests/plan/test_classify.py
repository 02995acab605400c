"""The work of planning is that of what is found."""

from __future__ import annotations

import time
import tracemalloc

from sparse_hf import build_plan


def test_a_million_tokens_are_planned_in_no_time():
    tracemalloc.start()
    begin = time.process_time()
    plan = build_plan("window(512, 0) | first(4)", 1_000_000)
    taken = time.process_time() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tables = sum(t.numel() * t.element_size() for t in (plan.row_offsets, plan.columns, plan.full))
    # a generous bound: the figure itself is in docs/results
    assert taken < 20 and peak < 200e6 and tables < 2e6
    assert len(plan.columns) < 8 * plan.q_blocks
