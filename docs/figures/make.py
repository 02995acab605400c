"""Draw the figures of the documentation: `python docs/figures/make.py` writes the SVG files beside this script.

What the figures of patterns and plans show is computed by the library, not drawn by hand. `--png FOLDER` writes pictures of
700 pixels width as well, to look at.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from itertools import groupby

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from sparse_hf import EMPTY, FULL, PARTIAL, Pattern, build_plan

FOLDER = pathlib.Path(__file__).parent
# inches and dots that make 700 pixels
WIDTH, DPI = 7.0, 100
# light to dark, so that they differ without colour too; blue and orange are told apart by every kind of eye
NOTHING, LIGHT, DARK, ORANGE = "#ffffff", "#a6cbe3", "#08519c", "#e69f00"
INK, FAINT, GRID, PAPER = "#1a1a1a", "#8c8c8c", "#d0d0d0", "#f4f4f0"
MONO = {"family": "DejaVu Sans Mono", "fontsize": 9}
STATES = {EMPTY: NOTHING, PARTIAL: LIGHT, FULL: DARK}
NAMES = {PARTIAL: "P", FULL: "F"}
# tokens of the figure of patterns; of the plan the tokens, the block size, and where the second document begins
PATTERN_TOKENS = 14
OVERVIEW_PATTERN, OVERVIEW_TOKENS, OVERVIEW_RESULT = "window(3, 3) | first(1)", 24, "h200/2026-11-27-models"
PLAN_PATTERN, PLAN_TOKENS, PLAN_BLOCK, SECOND_DOCUMENT = "window(20, 0) | first(2) & causal()", 64, 8, 37


def cells(axes: Axes, colors: Sequence[Sequence[str]], title: str) -> None:
    """Queries down, keys across, a coloured cell each."""
    queries, keys = len(colors), len(colors[0])
    # a path for each colour, and one for the grid: hundreds of paths would make a large file
    for color in sorted({color for row in colors for color in row} - {NOTHING}):
        axes.add_patch(_patch(stretches(colors, color), facecolor=color, edgecolor="none"))
    lines = [[(0, i), (keys, i)] for i in range(queries)] + [[(j, 0), (j, queries)] for j in range(keys)]
    axes.add_patch(_patch(lines, facecolor="none", edgecolor=GRID, linewidth=0.4))
    axes.set(xlim=(0, keys), ylim=(queries, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, color=INK, pad=6, **MONO)
    axes.set_xlabel("key", fontsize=9, color=INK, labelpad=3)
    axes.set_ylabel("query", fontsize=9, color=INK, labelpad=3)
    for spine in axes.spines.values():
        spine.set_color(FAINT)


def stretches(colors: Sequence[Sequence[str]], color: str) -> list[list[tuple[int, int]]]:
    """The corners of rectangles, one for each stretch of neighbours of a colour."""
    found = []
    for i, row in enumerate(colors):
        begin = 0
        for own, cells_alike in groupby(row):
            end = begin + len(list(cells_alike))
            if own == color:
                found.append([(begin, i), (end, i), (end, i + 1), (begin, i + 1), (begin, i)])
            begin = end
    return found


def _patch(shapes: Sequence, **style) -> PathPatch:
    return PathPatch(Path.make_compound_path(*(Path(shape) for shape in shapes)), **style)


def overview() -> Figure:
    """Every pair, the pairs of a window with a global token, and what a training step takes of each."""
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    every, some, time = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    place = torch.arange(OVERVIEW_TOKENS)
    for axes, text, color, title in (
        (every, "full()", FAINT, "dense"),
        (some, OVERVIEW_PATTERN, DARK, OVERVIEW_PATTERN),
    ):
        held = Pattern.parse(text).allows(place[:, None], place).expand(OVERVIEW_TOKENS, OVERVIEW_TOKENS).tolist()
        cells(axes, [[color if pair else NOTHING for pair in row] for row in held], title)
    rows = json.loads((FOLDER.parent / "results" / f"{OVERVIEW_RESULT}.json").read_text(encoding="utf-8"))["rows"]
    for kind, color, name in (("dense", FAINT, "dense"), ("ours", DARK, "sparse")):
        points = [
            (row["n"], row["step_s"] * 1000)
            for row in rows
            if row["model"] == "bert" and row["kind"] == kind and row.get("step_s")
        ]
        time.loglog(*zip(*points, strict=True), "o-", color=color, markersize=3.5, linewidth=1.6)
        # beside the middle of the line
        time.annotate(name, points[-2], (-5, 5) if kind == "dense" else (3, -12), textcoords="offset points", color=INK,
                      fontsize=9, ha="right" if kind == "dense" else "left")  # fmt: skip
    lengths = sorted({row["n"] for row in rows})
    time.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    time.set_yticks([30, 100, 300, 1000], ["30 ms", "100 ms", "300 ms", "1 s"])
    time.minorticks_off()
    time.tick_params(labelsize=8, colors=INK)
    time.set_xlabel("tokens", fontsize=9, color=INK, labelpad=3)
    time.set_ylim(20, 2000)
    time.set_title("BERT, a training step", color=INK, pad=6, **MONO)
    time.spines[["top", "right"]].set_visible(False)
    time.grid(color=GRID, linewidth=0.4)
    return figure


def pattern() -> Figure:
    """What `|` and `&` do."""
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    titles = ("window(3, 0)", "first(2)", "window(3, 0)\n| first(2)", "(window(3, 0)\n| first(2))\n& causal()")
    place = torch.arange(PATTERN_TOKENS)
    for axes, title in zip(figure.subplots(1, 4), titles, strict=True):
        held = Pattern.parse(title).allows(place[:, None], place)
        cells(axes, [[DARK if pair else NOTHING for pair in row] for row in held.tolist()], title)
    return figure


def grid() -> Figure:
    """What `window2d` holds: the keys of three queries in the image, and all pairs."""
    height, width, radius, queries = 6, 8, 1, (0, 28, 47)
    figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
    *images, pairs = figure.subplots(1, 4)
    text = f"window2d({height}, {width}, {radius}, 1)"
    place = torch.arange(height * width + 1)
    held = (Pattern.parse(text) | Pattern.parse("first(1)")).allows(place[:, None], place).tolist()
    for axes, query in zip(images, queries, strict=True):
        keys = held[query + 1][1:]
        shown = [[ORANGE if i == query else DARK if key else NOTHING for i, key in enumerate(keys)]]
        cells(axes, [shown[0][row * width : (row + 1) * width] for row in range(height)], f"patch {query}")
        axes.set(xlabel="", ylabel="")
    cells(pairs, [[DARK if pair else NOTHING for pair in row] for row in held], f"{text}\n| first(1)")
    return figure


def plan() -> Figure:
    """From pairs to blocks to a table."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    pairs, blocks, table = figure.subplots(1, 3)
    documents = (torch.arange(PLAN_TOKENS) >= SECOND_DOCUMENT).long()[None]
    made = build_plan(PLAN_PATTERN, PLAN_TOKENS, segment_ids=documents, block_size=PLAN_BLOCK)
    held = made.to_dense()[0, 0].tolist()
    cells(pairs, [[DARK if pair else NOTHING for pair in row] for row in held], "1. pairs")
    for line in range(0, PLAN_TOKENS, PLAN_BLOCK):
        pairs.axhline(line, color=FAINT, linewidth=0.7)
        pairs.axvline(line, color=FAINT, linewidth=0.7)
    for draw in (pairs.axhline, pairs.axvline):
        draw(SECOND_DOCUMENT, color=ORANGE, linewidth=1.8)
    offsets, columns, full = (t.tolist() for t in (made.row_offsets, made.columns, made.full))
    rows = [
        {columns[entry]: FULL if full[entry] else PARTIAL for entry in range(begin, end)}
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    states = [[row.get(j, EMPTY) for j in range(made.kv_blocks)] for row in rows]
    cells(blocks, [[STATES[state] for state in row] for row in states], f"2. blocks of {PLAN_BLOCK}")
    for i, row in enumerate(rows):
        for j, state in row.items():
            color = NOTHING if state == FULL else INK
            blocks.text(j + 0.5, i + 0.55, NAMES[state], ha="center", va="center", fontsize=9, color=color)
    table.set(box_aspect=1)
    table.axis("off")
    table.set_title("3. the table", color=INK, pad=6, **MONO)
    lines = [f"{i} | " + " ".join(f"{j}{NAMES[state]}" for j, state in row.items()) for i, row in enumerate(rows)]
    lines = ["query block | key blocks", *lines, "", "row_offsets", " ".join(map(str, offsets))]
    style = {"family": MONO["family"], "fontsize": 8, "linespacing": 1.4}
    table.text(0.02, 1, "\n".join(lines), va="top", transform=table.transAxes, color=INK, **style)
    return figure


def box(axes: Axes, left: float, bottom: float, size: tuple[float, float], text: str, **style) -> None:
    """A box with its text in the middle."""
    fill, color, weight = style.get("fill", PAPER), style.get("color", INK), style.get("weight", "normal")
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), *size, boxstyle="round,pad=0,rounding_size=0.06", facecolor=fill, edgecolor=FAINT, linewidth=0.9
        )
    )  # fmt: skip
    middle = left + size[0] / 2, bottom + size[1] / 2
    axes.text(*middle, text, ha="center", va="center", fontsize=style.get("fontsize", 9), color=color, weight=weight)


def arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    axes.annotate(
        "", end, begin, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0}
    )
    if label:
        x, y = (begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2
        is_level = begin[1] == end[1]
        shift = (0, 0.06) if is_level else (0.07, 0)
        axes.text(x + shift[0], y + shift[1], label, fontsize=8, color=INK, ha="center" if is_level else "left",
                  va="bottom" if is_level else "center")  # fmt: skip


def canvas(height: float) -> tuple[Figure, Axes]:
    """A figure whose coordinates are inches."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    return figure, axes


# the ladder of `dispatch.py`: what is asked, and what runs if the answer is yes
LADDER = (
    ("Does the pattern leave out no pair of this text?", "Dense", "PyTorch's attention"),
    ("Are there fewer than 128 queries (decoding)?", "Decode", "PyTorch's attention, slices of keys"),
    ("A window over a short text, on a GPU?", "SlidingWindow", "PyTorch's FlashAttention-2"),
    ("Are pairs chosen by content (lsh, topk)?", "ContentPairs", "positions and choices, merged"),
    ("Marks in a call that a CUDA graph records?", "GlobalTokens", "window and marked tokens, merged"),
    ("A stride that pays when put side by side?", "Strided", "each part on a backend for blocks"),
)
BLOCKS = (("fa", "long texts"), ("triton", "a GPU"), ("flex", "a GPU"), ("blockwise", "anywhere"))


def backends() -> Figure:
    """The ladder of "auto"."""
    height, step, top = 6.07, 0.72, 5.44
    figure, axes = canvas(height)
    question, answer = (3.15, 0.46), (2.75, 0.46)
    for number, (asked, name, what) in enumerate(LADDER):
        y = top - number * step
        box(axes, 0.25, y, question, f"{number + 1}. {asked}", fontsize=8.5)
        box(axes, 4.0, y, answer, f"{name}\n{what}", fill="#d9e8f5", fontsize=8.5)
        arrow(axes, (3.4, y + 0.23), (4.0, y + 0.23), "yes")
        arrow(axes, (1.8, y), (1.8, y - step + 0.46), "no")
    y = top - len(LADDER) * step
    box(axes, 0.25, y, question, "7. A plan in blocks: the first that can, and pays", fontsize=8.5)
    width, gap = 1.5, 0.19
    for number, (name, where) in enumerate(BLOCKS):
        x = 0.25 + number * (width + gap)
        box(axes, x, 0.2, (width, 0.5), f"{name}\n{where}", fill=DARK, color=NOTHING, fontsize=9)
        if number:
            arrow(axes, (x - gap, 0.45), (x, 0.45))
    arrow(axes, (1.0, y), (1.0, 0.7))
    return figure


# room, what it is, and where it stands: left, bottom, width, height
FLOORS = (
    ("cli/", "the command sparse-hf", 0.2, 4.44, 6.6, 0.56),
    ("evaluation/", "what is lost?", 4.7, 3.72, 2.1, 0.56),
    ("conversion/", "checkpoint to checkpoint", 0.2, 3.0, 2.1, 0.56),
    ("train/", "fine-tuning, healing", 2.45, 3.0, 2.1, 0.56),
    ("bench/", "is it fast?", 4.7, 3.0, 2.1, 0.56),
    ("models/", "families, masks, caches", 0.2, 2.28, 2.1, 0.56),
    ("parallel/", "a text over processes", 2.45, 2.28, 2.1, 0.56),
    ("attention/", "HOW pairs are computed: (q, k, v, plan) to out, lse", 0.2, 1.56, 4.35, 0.56),
    ("analysis/", "pictures, counts, reach", 4.7, 1.56, 2.1, 1.28),
    ("plan/", "WHERE the work is: pattern, lengths and batch to tables", 0.2, 0.84, 6.6, 0.56),
    ("pattern/", "WHAT may attend to what: frozen values, no length, no batch", 0.2, 0.12, 6.6, 0.56),
)
SHADES = {"pattern/": "#c6dbef", "plan/": "#d6e6f4", "attention/": "#e3eef8", "models/": "#eef4fa"}


def floors() -> Figure:
    """The rooms, each of which imports from those below it."""
    figure, axes = canvas(5.12)
    for name, what, left, bottom, width, height in FLOORS:
        box(axes, left, bottom, (width, height), "", fill=SHADES.get(name, PAPER))
        x, y = left + width / 2, bottom + height / 2
        style = {"ha": "center", "va": "center", "color": INK}
        axes.text(x, y + 0.1, name, fontsize=10, weight="bold", family=MONO["family"], **style)
        axes.text(x, y - 0.13, what, fontsize=8.5, **style)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": overview, "floors": floors, "pattern": pattern, "grid": grid, "plan": plan, "backends": backends,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", type=pathlib.Path, help="a folder for pictures to look at")
    png = parser.parse_args().png
    # the same bytes in every run
    matplotlib.rcParams["svg.hashsalt"] = "sparse_hf"
    for name, draw in FIGURES.items():
        figure = draw()
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        if png is not None:
            figure.savefig(png / f"{name}.png", dpi=DPI)


if __name__ == "__main__":
    main()
