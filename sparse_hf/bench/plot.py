"""The figures of a benchmark as a picture: panels of lines against length, each line named where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console

from .results import Result, Row

# the least factor that an axis of values spans, so that what is flat is drawn flat
LEAST_SPAN = 10
# inches of a panel and of the names beside it
PANEL, NAMES, HEIGHT = 4.4, 2.0, 4.4
# characters to an inch of the title, and pixels between names of neighbouring lines
TITLE_CHARACTERS, NAMES_APART = 10, 15
# how the line of a kind, or of an attention implementation, is drawn
LINE_STYLES = {
    "ours": "-", "window": "--", "transformers": "--", "dense": ":", "tiles": "-", "blocks": ":", "flex_attention": "-.",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line, from its first point `(length, value)` to its last, and the name that stands there."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    style: str = "-"
    marker: str = "o"


@dataclass(frozen=True)
class Panel:
    """Lines over one axis of lengths, or of what else `across` says."""

    values: str
    lines: Sequence[Line]
    across: str = "tokens"


def draw_beside(path: Path | None, result: Result, plot: Callable[[Result, Path], Any], console: Console) -> None:
    """Draw a benchmark beside its file of figures, if there is one, a row of it ran, and matplotlib is installed."""
    if path is None or all(row.get("failed") for row in result["rows"]):
        return
    try:
        plot(result, path.with_suffix(".png"))
    except ImportError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False)


def plot_result(result: Result, title: str, path: str | Path, time: tuple[str, str] | None = None) -> None:
    """Draw the rows of a benchmark: time of a step, and peak memory.

    `time` names the key of the times of another benchmark, and what to call them.
    """
    measured = [row for row in result["rows"] if not row.get("failed")]
    what, called = time or _step_or_forward(measured)
    # a model has one color, of Transformers and of ours
    colors: dict[str, str] = {}
    groups: dict[str, list[Row]] = {}
    for row in measured:
        groups.setdefault(row["name"], []).append(row)
        colors.setdefault(row.get("model", row["name"]), f"C{len(colors)}")

    def lines(key: str, scale: float) -> list[Line]:
        return [
            Line(
                readable(rows[0]),
                [(row["n"], (row[key] or 0) * scale) for row in rows],
                colors[rows[0].get("model", name)],
                LINE_STYLES.get(rows[0].get("implementation", ""), LINE_STYLES[rows[0]["kind"]]),
                "s" if rows[0].get("compile_mode") else "o",
            )
            for name, rows in groups.items()
        ]

    panels = [Panel(f"{called}, ms", lines(what, 1e3)), Panel("peak memory, MiB", lines("peak_bytes", 2**-20))]
    facts = result["environment"]
    draw(panels, f"{title}, {facts['hardware']}, torch {facts['versions']['torch']}", path)


def draw(panels: Sequence[Panel], title: str, path: str | Path) -> None:
    """Draw panels into a PNG file, two in a row.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('a plot needs matplotlib: pip install "matplotlib>=3.9"') from None
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    width = columns * (PANEL + NAMES)
    figure = Figure(figsize=(width, rows * HEIGHT), layout="constrained")
    figure.suptitle(fill(title, round(width * TITLE_CHARACTERS)), fontsize=10)
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, number + 1), panel)
    # limits are final only once all is drawn
    figure.canvas.draw()
    for axis, panel in zip(figure.axes, panels, strict=True):
        _name_lines(axis, panel)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_panel(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for line in panel.lines:
        lengths, values = zip(*line.points, strict=True)
        axis.plot(lengths, values, color=line.color, linestyle=line.style, marker=line.marker, markersize=3)
    lengths = sorted({length for line in panel.lines for length, _ in line.points})
    axis.set(xscale="log", yscale="log", xlabel=panel.across, ylabel=panel.values)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=30 if len(lengths) > 4 else 0)
    low, high = axis.get_ylim()
    wider = max(1, LEAST_SPAN * low / high) ** 0.5
    axis.set_ylim(low / wider, high * wider)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _name_lines(axis: Any, panel: Panel) -> None:
    """Write the name of each line beside the panel, at the height of its last point or as near as names allow."""
    ends = sorted((axis.transData.transform(line.points[-1])[1], number) for number, line in enumerate(panel.lines))
    bottom, top = axis.get_window_extent().intervaly
    heights = apart([height for height, _ in ends], NAMES_APART)
    # names at the upper edge push those below them down
    excess = max(0.0, heights[-1] - top) if heights else 0.0
    for height, (_, number) in zip(heights, ends, strict=True):
        line = panel.lines[number]
        axis.annotate(
            line.name, line.points[-1], (1.03, (height - excess - bottom) / (top - bottom)), textcoords="axes fraction",
            color=line.color, fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": line.color, "alpha": 0.3, "lw": 0.8, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights, moved as little as may be so that neighbours are `least` apart."""
    groups: list[tuple[float, int]] = []
    for height in heights:
        middle, count = height, 1
        # a group's middle is the mean of its own heights, each less what those below it take
        while groups and groups[-1][0] + (groups[-1][1] + count) * least / 2 > middle:
            below, number = groups.pop()
            middle, count = (below * number + middle * count) / (number + count), number + count
        groups.append((middle, count))
    return [middle + (k - (count - 1) / 2) * least for middle, count in groups for k in range(count)]


# names of rows in files of results -> what a reader calls them
READABLE = {
    "sdpa_dense": "dense, SDPA",
    "sdpa_flash": "dense, FlashAttention 2",
    "sdpa_cudnn": "dense, cuDNN",
    "sdpa_efficient": "dense, memory-efficient",
    "sdpa_flash_padded": "dense, FlashAttention 2, values padded",
    "varlen_fa2": "window, FlashAttention 2",
    "flash_attn_4": "window, FlashAttention 4",
    "flash_attn_4_dense": "dense, FlashAttention 4",
    "flex_attention": "window, FlexAttention",
}


def readable(row: Row) -> str:
    """What a reader calls a row."""
    name: str = row["name"]
    # of one layer, ours are called by their backends
    is_backend = row["kind"] == "ours" and "sparse_hf" not in name
    return f"sparse_hf, {name}" if is_backend else READABLE.get(name, name)


def _step_or_forward(rows: list[Row]) -> tuple[str, str]:
    both = all(row["step_s"] is not None for row in rows)
    return ("step_s", "forward + backward") if both else ("forward_s", "forward")
