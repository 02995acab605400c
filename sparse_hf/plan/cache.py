"""What is computed from a plan once, and lives and dies with it.

Threads may compute the same thing twice, and all of them get the one that was kept first. What is kept is ordinary, whatever mode
the call that asked for it ran in (`lasting`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch

from ..pattern.lasting import lasting

P = ParamSpec("P")
T = TypeVar("T")
_thread = threading.local()
_MISSING: Any = object()


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Remember what `function` gives for an object (a plan, a split) and further hashable arguments, on that object.

    A cache apart would hold tables of plans that are gone, or drop those that a recorded CUDA graph still reads.
    """

    @functools.wraps(function)
    def remembering(*arguments: P.args, **named: P.kwargs) -> T:
        owner, *rest = arguments
        results: dict[Any, Any] = owner.__dict__.setdefault("_remembered", {})
        key = (function, *rest, *named.items())
        found = results.get(key, _MISSING)
        return results.setdefault(key, made(function, *arguments, **named)) if found is _MISSING else found

    return remembering


class kept(Generic[T]):  # noqa: N801 - used as a decorator
    """A property that is computed when it is first asked for, by another thread within `made_apart`."""

    def __init__(self, function: Callable[[Any], T]):
        self.function, self.name, self.__doc__ = function, "", function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> kept[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance, owner):
        if instance is None:
            return self
        # what stands there is found without coming here again
        return instance.__dict__.setdefault(self.name, made(self.function, instance))


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


def made(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What `function` gives, as tensors that outlive the call; made by another thread within `made_apart`."""
    if not getattr(_thread, "apart", False):
        with lasting():
            return function(*arguments, **named)
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_finished, device, function, *arguments, **named).result()


def _finished(device: int | None, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    if device is None:
        return function(*arguments, **named)
    # a new thread begins on the first device; the caller goes on in a stream of its own
    with torch.cuda.device(device):
        found = function(*arguments, **named)
        torch.cuda.current_stream().synchronize()
    return found
