"""Triton's interpreter, without what it does again and again."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def once_a_kernel(patch: Callable[[FunctionType], Any]) -> Callable[[FunctionType], Any]:
    """Triton's interpreter puts its own functions into `triton.language`, for a kernel and at every call of a function in it.

    The calls find all of it done, and look through the whole language for that, which takes as long as the kernel itself.
    Here the functions of a module ask once a kernel.
    """
    done: set[int] = set()

    def patched(function: FunctionType) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None
        # the kernel comes first, and takes back what was put in at its end
        is_kernel = not done
        done.add(module)
        scope = patch(function)
        return _Scope(scope, done) if is_kernel else scope

    return patched


class _Scope:
    """What a kernel takes back."""

    def __init__(self, scope: Any, done: set[int]):
        self.scope, self.done = scope, done

    def restore(self) -> None:
        self.done.clear()
        self.scope.restore()
