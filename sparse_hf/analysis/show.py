"""A pattern as a picture, and in numbers beside dense attention.

Legend: n length, B block size, H heads, D head dim.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..pattern import EMPTY, FULL, PARTIAL, First, Pattern
from ..pattern.base import Marks, as_pattern
from ..pattern.forms import StrideForm, read_stride
from ..pattern.past import past_of
from ..plan import BlockPlan, build_plan, most_row_counts
from ..plan.strided import is_worth_regrouping
from ..units import size
from .reach import Reach, reach

COLORS = {EMPTY: "#ffffff", PARTIAL: "#9ecae1", FULL: "#08519c"}
SHADES = {EMPTY: " ", PARTIAL: "▒", FULL: "█"}
# dots of a picture's side, and its size and margins in inches
MAX_CELLS, SIDE, LEFT, BELOW = 800, 5.0, 0.85, 0.95
# characters of a title's line
TITLE_CHARACTERS = 60
# of a dot, the pairs by row and by column that are asked for, and the least that is drawn of one that has any
SAMPLED, LEAST_SHARE = 3, 0.6
# rows of dots whose pairs are asked for at once
ROWS_AT_ONCE = 50


@dataclass(frozen=True)
class Description:
    """A pattern at one length, for one layer, in numbers. FLOPs count the pattern's own pairs; bytes are per layer.

    What is kept for gradients beside queries, keys, values and the output is a number per query and head, and the block table; of
    dense attention, as SDPA computes it, these numbers.
    """

    pattern: str
    length: int
    pairs: int
    density: float
    keys_per_query: tuple[int, float, int]  # least, mean, most
    blocks: tuple[int, int, int]  # empty, partial, full
    layers_to_reach: int | None
    reach_note: str
    flops_forward: int
    flops_step: int
    dense_flops_forward: int
    table_bytes: int
    dense_pairs: int
    kept_bytes: int
    dense_kept_bytes: int


def describe(
    pattern: Pattern | str,
    length: int,
    *,
    num_heads: int = 12,
    head_dim: int = 64,
    block_size: int = 128,
    marked: Sequence[int] = (),
    is_causal: bool = False,
) -> Description:
    """Count what a pattern holds at a length.

    Args:
        pattern: a pattern or its text; of `per_head(...)`, numbers are means over heads; pairs that are chosen from queries
            and keys count as many as there may be.
        length: tokens n.
        num_heads, head_dim, block_size: of the layer.
        marked: positions that `marked()` speaks of.
        is_causal: whether the layer is a decoder's, which computes of any pattern the pairs that look back.

    Raises:
        ValueError: a bad pattern, or a length below 1.

    Examples:
        >>> facts = describe("window(256, 256) | first(1)", 4096)
        >>> round(facts.density, 3), facts.layers_to_reach
        (0.122, 2)
    """
    pattern = _as_computed(pattern, is_causal)
    plan = _plan(pattern, length, block_size, marked)
    most = torch.arange(1, length + 1) if is_causal else torch.full((length,), length)
    counts = most_row_counts(pattern, length, marks=_marks(length, marked), block_size=block_size)
    pairs = int(counts.sum() // counts.shape[1])
    full = int(plan.full.sum())
    partial = len(plan.full) - full
    found = None if pattern.uses_content else reach([plan])
    table = sum(t.numel() * t.element_size() for t in (plan.row_offsets, plan.columns, plan.full))
    # the logarithm of the sum of a query's weights, in 32 bits
    sums = 4 * num_heads * length
    return Description(
        pattern=str(pattern),
        length=length,
        pairs=pairs,
        density=float(counts.double().mean()) / length,
        keys_per_query=(int(counts.min()), float(counts.double().mean()), int(counts.max())),
        blocks=(counts.shape[1] * plan.q_blocks * plan.kv_blocks - full - partial, partial, full),
        layers_to_reach=None if found is None else found.layers,
        reach_note="depends on queries and keys" if found is None else _reach_note(found),
        flops_forward=4 * head_dim * num_heads * pairs,
        flops_step=14 * head_dim * num_heads * pairs,
        dense_flops_forward=4 * head_dim * num_heads * int(most.sum()),
        table_bytes=table,
        dense_pairs=int(most.sum()),
        kept_bytes=sums + table,
        dense_kept_bytes=sums,
    )


def _as_computed(pattern: Pattern | str, is_causal: bool) -> Pattern:
    """A pattern as a layer computes it."""
    return past_of(as_pattern(pattern)) if is_causal else as_pattern(pattern)


def describe_stack(
    patterns: Sequence[Pattern | str],
    length: int,
    *,
    block_size: int = 128,
    marked: Sequence[int] = (),
    is_causal: bool = False,
) -> Reach:
    """After how many layers every token reaches every other, if layers have these patterns in turn, over and over.

    The receptive field of a stack, for patterns that are meant to work together: the two halves of Sparse Transformer
    (arXiv:1904.10509, section 4.2) reach every earlier token in two layers, and one of them alone does not.

    Args:
        patterns: a pattern or its text for each layer; where a model has more layers, they begin anew.
        length: tokens n; exact up to 16,384, see `sparse_hf.analysis.reach`.
        block_size, marked, is_causal: as in `describe`.

    Raises:
        ValueError: no pattern, a bad one, or a length below 1.

    Examples:
        >>> describe_stack(["chunk(64)", "stride(64)"], 1024).layers
        2
    """
    if not patterns:
        raise ValueError("patterns is empty; give a pattern for each layer")
    return reach([_plan(_as_computed(pattern, is_causal), length, block_size, marked) for pattern in patterns])


def render_stack(patterns: Sequence[Pattern | str], length: int, **options) -> Group:
    """Picture and numbers of every pattern of a stack, as `render`, and what its layers reach together."""
    parts = [render(pattern, length, **options) for pattern in patterns]
    shared = {key: options[key] for key in ("block_size", "marked", "is_causal") if key in options}
    found = describe_stack(patterns, length, **shared)
    names = ", then ".join(str(_as_computed(pattern, options.get("is_causal", False))) for pattern in patterns)
    return Group(*parts, Text(f"layers with {names}, in turn: {_reach_note(found)}", style="bold"))


def render(pattern: Pattern | str, length: int, *, width: int = 64, **options) -> Group:
    """The picture, then the numbers, for a terminal; options as in `describe`.

    Examples:
        >>> from rich.console import Console
        >>> Console(width=40).print(render("window(1, 0)", 4).renderables[0])
        window(1, 0)   at 4 tokens
    """
    facts = describe(pattern, length, **options)
    pattern = _as_computed(pattern, options.get("is_causal", False))
    plan = _plan(pattern, length, options.get("block_size", 128), options.get("marked", ()))
    parts: list = [Text(f"{facts.pattern}   at {length:,} tokens", style="bold")]
    for p, one in enumerate(_drawn(pattern, plan)):
        heads = [str(h) for h, own in enumerate(plan.heads) if own == p]
        if heads:
            parts.append(Text(f"heads {', '.join(heads)}: {one}"))
        parts.append(_picture(one, length, min(width, length), options.get("marked", ())))
        found = read_stride(one, length)
        if isinstance(found, StrideForm) and is_worth_regrouping(found, length, has_batch=bool(options.get("marked"))):
            parts.append(Text(f"computed with every {found.step}th token side by side, not in these blocks"))
    parts.append(
        Text(f"queries downward, keys to the right; {SHADES[FULL]} every pair, {SHADES[PARTIAL]} some, blank none")
    )
    parts.append(_numbers(facts))
    chosen = pattern.most_keys
    if chosen:
        parts.append(
            Text(
                f"up to {min(chosen, length):,} keys per query are chosen from queries and keys; numbers count them all"
            )
        )
    if any(one.uses_marks for one in plan.patterns) and not options.get("marked"):
        parts.append(Text("marked() comes from the batch, and nothing is marked here; give positions with --marked"))
    return Group(*parts)


def save_png(
    pattern: Pattern | str,
    length: int,
    path: str | Path,
    *,
    block_size: int = 128,
    marked: Sequence[int] = (),
    is_causal: bool = False,
    **_,
) -> Path:
    """Draw the pattern to a PNG file, a dot for each pair, or for a few of them where the text is long.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError: the folder does not exist.

    Examples:
        >>> save_png("window(64, 64) | first(1)", 512, "pattern.png").name
        'pattern.png'
    """
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "matplotlib>=3.9"') from error
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder; make it first")
    pattern = _as_computed(pattern, is_causal)
    plan = _plan(pattern, length, block_size, marked)
    drawn = _drawn(pattern, plan)
    cells = min(length, MAX_CELLS)
    counts = most_row_counts(pattern, length, marks=_marks(length, marked), block_size=block_size)
    density = float(counts.double().mean()) / length
    side = -(-length // cells)
    unit = "a dot is a pair" if side == 1 else f"a dot is up to {side} x {side} pairs"
    heads = [", ".join(str(h) for h, own in enumerate(plan.heads) if own == p) for p in range(len(drawn))]
    titles = [f"heads {whose}\n{one}" if whose else str(one) for whose, one in zip(heads, drawn, strict=True)]
    titles = ["\n".join(fill(line, TITLE_CHARACTERS) for line in title.split("\n")) for title in titles]
    # every dot of a picture has pixels of its own, so that none is lost: places are in inches
    above = 0.45 + 0.2 * max(title.count("\n") + 1 for title in titles)
    width, height = LEFT + len(drawn) * (SIDE + LEFT), BELOW + SIDE + above
    figure = Figure(figsize=(width, height))
    for p, (title, one) in enumerate(zip(titles, drawn, strict=True)):
        place = (LEFT + p * (SIDE + LEFT), BELOW, SIDE, SIDE)
        axis = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
        axis.imshow(
            _shares(one, length, cells, marked).numpy(), cmap=LinearSegmentedColormap.from_list("pairs", list(COLORS.values())),
            vmin=0, vmax=1, interpolation="nearest", extent=(0, length, length, 0),
        )  # fmt: skip
        # beside the picture, and not over its first row and column
        axis.spines[:].set_position(("outward", 3))
        axis.spines[:].set_color("grey")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("key position (tokens)")
        axis.set_ylabel("query position (tokens)")
    names = {EMPTY: "no pair", PARTIAL: "some pairs", FULL: "every pair"}
    handles = [Patch(facecolor=COLORS[s], edgecolor="grey", label=name) for s, name in names.items()]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    figure.text(
        0.5,
        1 - 0.12 / height,
        f"{length:,} tokens, {density:.2%} of all pairs; {unit}",
        ha="center",
        va="top",
        fontsize=10,
    )
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".png", delete=False) as file:
        figure.savefig(file, format="png", dpi=MAX_CELLS / SIDE)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def _shares(pattern: Pattern, length: int, cells: int, marked: Sequence[int]) -> torch.Tensor:
    """How much of each dot is filled, 0 to 1: `[cells, cells]`, of a few of its pairs; a dot with any pair is to be seen."""
    shares = _grid(pattern, length, cells, marked).float() / FULL
    if cells == length or pattern.uses_marks or pattern.uses_content:
        return shares
    # of each dot so many rows and columns, evenly spaced
    edges = torch.arange(cells * SAMPLED + 1) * length // (cells * SAMPLED)
    at, found = edges[:-1], torch.empty(cells, cells)
    for first in range(0, cells, ROWS_AT_ONCE):
        rows = at[first * SAMPLED : (first + ROWS_AT_ONCE) * SAMPLED]
        pairs = pattern.allows(rows[:, None], at[None, :], Marks(length=length)).expand(len(rows), len(at)).float()
        found[first : first + ROWS_AT_ONCE] = pairs.view(-1, SAMPLED, cells, SAMPLED).mean((1, 3))
    is_some = (shares > 0) & (shares < 1)
    return torch.where(is_some, found.clamp(LEAST_SHARE, 1.0), shares)


def _reach_note(found: Reach) -> str:
    whom = "every other token" if found.looks_ahead else "every earlier token"
    unit = "" if found.unit == 1 else f" (in blocks of {found.unit} tokens)"
    if found.is_beyond:
        return f"more than 1,000, to {whom}{unit}"
    return f"never reaches {whom}{unit}" if found.layers is None else f"{found.layers}, to {whom}{unit}"


def _drawn(pattern: Pattern | str, plan: BlockPlan) -> tuple[Pattern, ...]:
    """What is drawn: pairs that are chosen from queries and keys may be anywhere."""
    return (as_pattern(pattern),) if as_pattern(pattern).uses_content else plan.patterns


def _plan(pattern: Pattern | str, length: int, block_size: int, marked) -> BlockPlan:
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1 token")
    known = as_pattern(pattern).without_content()
    known = First(0) if known is None else known
    return build_plan(known, length, marks=_marks(length, marked), block_size=block_size)


def _marks(length: int, marked: Sequence[int]) -> torch.Tensor | None:
    outside = [x for x in marked if not 0 <= x < length]
    if outside:
        raise ValueError(f"marked positions {outside} lie outside the {length} tokens")
    if not marked:
        return None
    marks = torch.zeros(1, length, dtype=torch.bool)
    marks[0, list(marked)] = True
    return marks


def _grid(pattern: Pattern, length: int, cells: int, marked: Sequence[int]) -> torch.Tensor:
    """States of `cells` x `cells` rectangles that tile the plane, by the closed form."""
    edges = torch.arange(cells + 1) * length // cells
    first, last = edges[:-1], edges[1:] - 1
    about = Marks(length=length)
    flags = _marks(length, marked)
    if flags is not None:
        sums = torch.nn.functional.pad(flags[0].long().cumsum(0), (1, 0))
        found = sums[last + 1] - sums[first]
        state = ((found > 0).to(torch.int8) + (found == last - first + 1)).to(torch.int8)
        q_state, k_state = torch.broadcast_tensors(state[:, None], state[None, :])
        about = Marks(q_state, k_state, length)
    q0, q1, k0, k1 = torch.broadcast_tensors(first[:, None], last[:, None], first[None, :], last[None, :])
    return pattern.blocks(q0, q1, k0, k1, about)


def _picture(pattern: Pattern, length: int, cells: int, marked: Sequence[int]) -> Text:
    # a character is about twice as high as wide: two columns for one row
    rows = max(1, cells // 2)
    wide = _grid(pattern, length, 2 * rows, marked).view(rows, 2, 2 * rows)
    # two rows share a character: it is full if both are, empty if both are
    same = wide[:, 0] == wide[:, 1]
    states = torch.where(same, wide[:, 0], PARTIAL).tolist()
    border = "+" + "-" * 2 * rows + "+"
    lines = [border, *("|" + "".join(SHADES[s] for s in row) + "|" for row in states), border]
    return Text("\n".join(lines), no_wrap=True)


def _numbers(facts: Description) -> Table:
    layers, _, unit = facts.reach_note.partition(" (")
    table = Table(show_header=True, caption=f"layers are counted {unit[:-1]}" if unit else None)
    for column in ("", "sparse", "dense"):
        table.add_column(column, justify="left" if not column else "right")
    least, mean, most = facts.keys_per_query
    n = facts.length
    dense_keys = f"{n:,}" if facts.dense_pairs == n * n else f"up to {n:,}"
    table.add_row("pairs", f"{facts.pairs:,} ({facts.density:.3%})", f"{facts.dense_pairs:,}")
    table.add_row("keys, least / mean / most", f"{least:,} / {mean:,.1f} / {most:,}", dense_keys)
    table.add_row("blocks, empty/partial/full", " / ".join(f"{b:,}" for b in facts.blocks), "")
    table.add_row("layers to reach all tokens", layers, "1")
    table.add_row(
        "FLOPs of a layer, forward", f"{facts.flops_forward / 1e9:,.2f} G", f"{facts.dense_flops_forward / 1e9:,.2f} G"
    )
    table.add_row(
        "FLOPs, with backward",
        f"{facts.flops_step / 1e9:,.2f} G",
        f"{facts.dense_flops_forward * 3.5 / 1e9:,.2f} G",
    )
    table.add_row("kept beside q, k, v, out", size(facts.kept_bytes), size(facts.dense_kept_bytes))
    return table
