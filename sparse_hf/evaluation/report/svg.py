"""Pictures as SVG text: lines, points, heat maps. Colours that the colour-blind tell apart, and a letter beside each.

Units are those of the picture, which is scaled to the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

# Okabe and Ito's, dark enough on white; dashes tell apart what shares a colour
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3B9FD8", "#7A4FA3", "#8B4513", "#5A6B00")
DASHES = ("", "6 3", "2 3", "9 3 2 3")
WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 30, 14, 46
# from little to much, light to dark: readable in grey, too
RAMP = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
FONT = 12


@dataclass(frozen=True)
class Series:
    """Points of a candidate, which is called by its letter in pictures; None is a gap."""

    letter: str
    name: str
    number: int
    points: Sequence[tuple[float, float | None]]

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def dash(self) -> str:
        return DASHES[self.number // 2 % len(DASHES)]


@dataclass(frozen=True)
class Axis:
    """What an axis says, and how it writes its numbers; `log` for what grows by factors, of 2 where numbers are bytes."""

    title: str
    write: Callable[[float], str] = lambda x: f"{x:g}"
    log: bool = False
    base: int = 10
    ticks: tuple[float, ...] = ()
    # whether it begins at zero though no point is there
    from_zero: bool = False


class _Scale:
    """Values of an axis -> places of the picture."""

    def __init__(self, values: Sequence[float], axis: Axis, begin: float, end: float):
        low, high = min(values), max(values)
        low = 0.0 if axis.from_zero and not axis.log else low
        if high <= low:
            low, high = (low / 2, high * 2) if axis.log and low > 0 else (low - 0.5, high + 0.5)
        self.log, self.base, self.begin, self.end = axis.log, axis.base, begin, end
        self.low, self.high = (math.log10(low), math.log10(high)) if axis.log else (low, high)
        if not axis.from_zero and not axis.ticks:
            room = (self.high - self.low) * 0.05
            self.low, self.high = self.low - room, self.high + room
        self.ticks = axis.ticks or self._ticks()

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.begin + (at - self.low) / (self.high - self.low) * (self.end - self.begin)

    def _ticks(self) -> tuple[float, ...]:
        if self.log:
            return self._log_ticks()
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return tuple(round(i * step, 10) for i in range(first, int(self.high / step + 1e-9) + 1))

    def _log_ticks(self) -> tuple[float, ...]:
        if self.base == 2:
            found = range(math.ceil(self.low / math.log10(2)), math.floor(self.high / math.log10(2)) + 1)
            return tuple(2.0**exponent for exponent in found[:: max(1, -(-len(found) // 6))])
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = tuple(
                f * 10.0**e for e in exponents for f in factors if self.low <= math.log10(f * 10.0**e) <= self.high
            )
            if len(found) >= 3:
                return found[:: -(-len(found) // 7)]
        # a small range, in which numbers are as good as evenly spaced
        low, high = 10**self.low, 10**self.high
        step = _round_step((high - low) / 3)
        return tuple(round(i * step, 10) for i in range(math.ceil(low / step), int(high / step) + 1))


def _round_step(step: float) -> float:
    power = 10 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def lines(series: Sequence[Series], x: Axis, y: Axis, about: str) -> str:
    """A line for each of the series, with its letter at its end; `about` is what a screen reader says."""
    drawn = [one for one in series if any(value is not None for _, value in one.points)]
    xs = [at for one in drawn for at, value in one.points if value is not None]
    ys = [value for one in drawn for _, value in one.points if value is not None]
    to_x, to_y = _Scale(xs, x, LEFT, WIDTH - RIGHT), _Scale(ys, y, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(x, y, to_x, to_y)]
    ends = []
    for one in drawn:
        places = [(to_x(at), to_y(value)) for at, value in one.points if value is not None]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="1.8" stroke-dasharray="{one.dash}">'
            f"<title>{escape(one.name)}</title></polyline>"
        )
        ends.append((places[-1][1], places[-1][0], one))
    for at, (_, px, one) in zip(_spread([end[0] for end in ends]), ends, strict=True):
        parts.append(_text(min(px + 5, WIDTH - RIGHT + 5), at + 4, one.letter, "start", one.colour, bold=True))
    return _picture(parts, WIDTH, HEIGHT, about)


def points(series: Sequence[Series], x: Axis, y: Axis, about: str) -> str:
    """A point with its letter for each of the series, which have one each."""
    known = [(one, *one.points[0]) for one in series if one.points[0][1] is not None]
    to_x = _Scale([at for _, at, _ in known], x, LEFT, WIDTH - RIGHT)
    to_y = _Scale([value for _, _, value in known if value is not None], y, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(x, y, to_x, to_y)]
    places = sorted(
        ((to_y(value), to_x(at), one) for one, at, value in known if value is not None), key=lambda p: p[:2]
    )
    for py, px, one in places:
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{one.colour}"><title>{escape(one.name)}</title></circle>'
        )
    taken = [(px, py + 4) for py, px, _ in places]
    for py, px, one in places:
        at = px + 8, py + 4
        # letters of points that lie together stand one behind the other
        while any(abs(at[0] - a) < 11 and abs(at[1] - b) < 11 for a, b in taken if (a, b) != (px, py + 4)):
            at = at[0] + 11, at[1]
        taken.append(at)
        parts.append(_text(at[0], at[1], one.letter, "start", one.colour, bold=True))
    return _picture(parts, WIDTH, HEIGHT, about)


# a map of more is scrolled on a laptop, where two stand side by side; and cells are no narrower than this
WIDEST_MAP, LEAST_CELL = 560, 13


@dataclass(frozen=True)
class Grid:
    """A heat map: values between `low` and `high` by row and column, written into the cells where there is room."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    row_title: str = ""
    column_title: str = ""
    write: Callable[[float], str] = lambda x: f"{x:.0%}"
    low: float = 0.0
    high: float = 1.0
    cell: tuple[int, int] = (44, 22)


def heat_map(grid: Grid, about: str) -> str:
    """The values of a grid as shades, dark where there is much."""
    left = 8 + max((len(row) for row in grid.rows), default=0) * 7.5 + (20 if grid.row_title else 0)
    room = int((WIDEST_MAP - left - 8) / max(1, len(grid.columns)))
    width, height = min(grid.cell[0], max(LEAST_CELL, room)), grid.cell[1]
    grid = replace(grid, cell=(width, height))
    top = 6
    total = left + width * len(grid.columns) + 8
    bottom = top + height * len(grid.rows)
    parts = []
    for r, (row, values) in enumerate(zip(grid.rows, grid.values, strict=True)):
        y = top + r * height
        if height >= 10 or r % math.ceil(12 / height) == 0:
            parts.append(_text(left - 5, y + height / 2 + 4, row, "end"))
        for c, value in enumerate(values):
            parts += _cell(grid, left + c * width, y, value, f"{row} {grid.columns[c]}")
    every = max(1, math.ceil(max((len(column) for column in grid.columns), default=1) * 7 / width))
    for c in range(0, len(grid.columns), every):
        parts.append(_text(left + (c + 0.5) * width, bottom + 15, grid.columns[c], "middle"))
    if grid.column_title:
        parts.append(_text((left + total) / 2, bottom + 32, grid.column_title, "middle"))
    if grid.row_title:
        parts.append(_upright(12, (top + bottom) / 2, grid.row_title))
    return _picture(parts, total, bottom + (38 if grid.column_title else 22), about, is_fixed=True)


def _cell(grid: Grid, x: float, y: float, value: float | None, what: str) -> list[str]:
    width, height = grid.cell
    if value is None:
        return [f'<rect x="{x:.1f}" y="{y:.1f}" width="{width}" height="{height}" fill="none" stroke="#ddd"/>']
    share = min(max((value - grid.low) / (grid.high - grid.low), 0), 1)
    text = grid.write(value)
    parts = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width}" height="{height}" fill="{shade(share)}" stroke="#fff" stroke-width="0.6">'
        f"<title>{escape(what)}: {text}</title></rect>"
    ]
    if width >= len(text) * 7 and height >= 16:
        parts.append(_text(x + width / 2, y + height / 2 + 4, text, "middle", "#fff" if share > 0.55 else "#111"))
    return parts


def shade(share: float) -> str:
    """A colour between little (0) and much (1)."""
    at = share * (len(RAMP) - 1)
    i = min(int(at), len(RAMP) - 2)
    mixed = (round(a + (b - a) * (at - i)) for a, b in zip(RAMP[i], RAMP[i + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def swatch(number: int) -> str:
    """The line by which a candidate is drawn, for a legend."""
    one = Series("", "", number, ())
    return (
        '<svg class="swatch" viewBox="0 0 34 10" width="34" height="10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="34" y2="5" stroke="{one.colour}" stroke-width="2.4" stroke-dasharray="{one.dash}"/></svg>'
    )


def _axes(x: Axis, y: Axis, to_x: _Scale, to_y: _Scale) -> list[str]:
    parts = []
    for tick in to_y.ticks:
        at = to_y(tick)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="#e3e3e3"/>')
        parts.append(_text(LEFT - 6, at + 4, y.write(tick), "end"))
    for tick in to_x.ticks:
        at = to_x(tick)
        parts.append(
            f'<line x1="{at:.1f}" y1="{HEIGHT - BOTTOM}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM + 4}" stroke="#555"/>'
        )
        parts.append(_text(at, HEIGHT - BOTTOM + 17, x.write(tick), "middle"))
    parts.append(
        f'<line x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}" stroke="#555"/>'
    )
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.title, "middle"))
    parts.append(_upright(14, (TOP + HEIGHT - BOTTOM) / 2, y.title))
    return parts


def _spread(places: list[float]) -> list[float]:
    """Places moved apart, so that letters there do not cover each other."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved, last = list(places), -math.inf
    for i in order:
        last = moved[i] = max(places[i], last + FONT)
    limit = float(HEIGHT - BOTTOM - FONT / 3)
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - FONT
    return moved


def _text(x: float, y: float, what: str, anchor: str, colour: str = "#222", bold: bool = False) -> str:
    weight = ' font-weight="700"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(what)}</text>'


def _upright(x: float, y: float, what: str) -> str:
    return f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle" fill="#222">{escape(what)}</text>'


def _picture(parts: Sequence[str], width: float, height: float, about: str, is_fixed: bool = False) -> str:
    """The picture, as wide as its column, or `is_fixed` to its own width."""
    kind = f'style="width:{width:.0f}px"' if is_fixed else 'class="wide"'
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" {kind} font-size="{FONT}" role="img" '
        f'aria-label="{escape(about)}">{"".join(parts)}</svg>'
    )
