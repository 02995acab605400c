"""How far the window of a split reaches, which holds pairs that its columns must not count again."""

from __future__ import annotations

from ....pattern import Window
from ....plan import Split


def reach(split: Split) -> tuple[tuple[int, int], tuple[int, int]]:
    """(left, right) of the window, which holds nothing if there is none, and of what limits the columns."""
    window, clip = split.form.window, split.form.clip
    far = split.kv_len

    def sides(w: Window) -> tuple[int, int]:
        left, right = (far if side is None else min(side, far) for side in (w.left, w.right))
        return left, right

    return (-1, -1) if window is None else sides(window), sides(clip)
