"""The same work in several threads that begin together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 8
Found = TypeVar("Found")


def at_once(work: Callable[[int], Found], threads: int = THREADS) -> list[Found]:
    """What `work(number)` gives in each thread; the first mistake of any is raised."""
    start = threading.Barrier(threads)

    def begin(number: int) -> Found:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begin, range(threads)))
