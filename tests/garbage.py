"""Searches for garbage, without what libraries have made of themselves."""

import gc
import sys

# new modules that are worth saying again that all of them stay
MANY_MODULES = 50
_staying = 0


def keep_libraries() -> None:
    """Have searches for garbage leave out all that there is now, if libraries were imported since it was said last.

    A run of Trainer makes eight searches, each of which takes as long as a training step of a tiny model, or many of them.
    """
    global _staying
    if len(sys.modules) >= _staying + MANY_MODULES:
        gc.collect()
        gc.freeze()
        _staying = len(sys.modules)
