"""What is computed from a plan once, and lives and dies with it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_thread = threading.local()


def remembered(function: Callable) -> Callable:
    """Remember what `function` gives for an object (a plan, a split) and further hashable arguments, on that object.

    A cache apart would hold tables of plans that are gone, or drop those that a recorded CUDA graph still reads.
    """

    @functools.wraps(function)
    def remembering(owner, *rest):
        memo = owner.__dict__.setdefault("_memo", {})
        key = (function, *rest)
        if key not in memo:
            memo[key] = made(function, owner, *rest)
        return memo[key]

    return remembering


class kept(functools.cached_property):  # noqa: N801 - used as a decorator
    """A `cached_property` that another thread makes within `made_apart`."""

    def __init__(self, function: Callable):
        super().__init__(lambda owner: made(function, owner))
        self.__doc__ = function.__doc__


@contextmanager
def made_apart(apart: bool) -> Iterator[None]:
    """Within, if `apart`, another thread makes what is kept.

    All that this thread allocates while a CUDA graph is warmed up belongs to the graph, which wants it back after the call.
    """
    before, _thread.apart = getattr(_thread, "apart", False), apart
    try:
        yield
    finally:
        _thread.apart = before


def made(function: Callable, *arguments):
    """What `function` gives, made by another thread within `made_apart`."""
    if not getattr(_thread, "apart", False):
        return function(*arguments)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_finished, function, arguments).result()


def _finished(function: Callable, arguments: tuple):
    found = function(*arguments)
    if torch.cuda.is_available():
        # the caller goes on in a stream of its own
        torch.cuda.current_stream().synchronize()
    return found
