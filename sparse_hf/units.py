"""Figures as people read them: three digits and a unit."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """A time: "2.71 ms", "390 ms", "14.2 s"; nothing for None."""
    if seconds is None:
        return ""
    if seconds >= 1:
        return f"{_three_digits(seconds)} s"
    return f"{_three_digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{_three_digits(seconds * 1e6)} us"


def size(count: float | None) -> str:
    """Bytes: "640 KiB", "1.25 GiB"; nothing for None."""
    if count is None:
        return ""
    if abs(count) < 1000:
        return f"{count:,.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if abs(count) < 1000:
            return f"{_three_digits(count)} {unit}"
    return f"{_three_digits(count / 1024)} GiB"


def times(ratio: float | None) -> str:
    """How many times something is something else: "1.60 x"; nothing for None."""
    return "" if ratio is None else f"{_three_digits(ratio)} x"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
