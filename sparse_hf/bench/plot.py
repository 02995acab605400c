"""The figures of a benchmark as a picture: time and memory against length."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from .results import Result, Row

# characters of a line above the two pictures
TITLE_CHARACTERS = 120
# the least factor that an axis of values spans, so that what is flat is drawn flat
LEAST_SPAN = 10
# how the line of a kind, or of an attention implementation, is drawn
LINE_STYLES = {
    "ours": "-", "window": "--", "transformers": "--", "dense": ":", "tiles": "-", "blocks": ":", "flex_attention": "-.",
}  # fmt: skip


def plot_result(result: Result, title: str, path: str | Path, time: tuple[str, str] | None = None) -> None:
    """Draw the rows of a benchmark: time of a step, and peak memory.

    `time` names the key of the times of another benchmark, and what to call them.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('a plot needs matplotlib: pip install "matplotlib>=3.9"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    # a model has one color, of Transformers and of ours; its rows have a line each, by
    # implementation or kind, and squares if compiled
    colors: dict[str, str] = {}
    measured = [row for row in result["rows"] if not row.get("failed")]
    what, called = time or _step_or_forward(measured)
    for name in dict.fromkeys(row["name"] for row in measured):
        rows = [row for row in measured if row["name"] == name]
        lengths = [row["n"] for row in rows]
        color = colors.setdefault(rows[0].get("model", name), f"C{len(colors)}")
        line = LINE_STYLES.get(rows[0].get("implementation"), LINE_STYLES[rows[0]["kind"]])
        marker = "s" if rows[0].get("compile_mode") else "o"
        style = {"label": name, "color": color, "linestyle": line, "marker": marker, "markersize": 3}
        left.plot(lengths, [row[what] * 1e3 for row in rows], **style)
        right.plot(lengths, [(row["peak_bytes"] or 0) / 2**20 for row in rows], **style)
    facts = result["environment"]
    title = f"{title}, {facts['hardware']}, torch {facts['versions']['torch']}"
    figure.suptitle(fill(title, TITLE_CHARACTERS), fontsize=10)
    left.set_ylabel(f"{called}, ms")
    right.set_ylabel("peak memory, MiB")
    lengths = sorted({row["n"] for row in measured})
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="tokens")
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        low, high = axis.get_ylim()
        wider = max(1, LEAST_SPAN * low / high) ** 0.5
        axis.set_ylim(low / wider, high * wider)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _step_or_forward(rows: list[Row]) -> tuple[str, str]:
    both = all(row["step_s"] is not None for row in rows)
    return ("step_s", "forward + backward") if both else ("forward_s", "forward")
