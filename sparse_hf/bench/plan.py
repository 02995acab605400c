"""`sparse-hf bench plan`: what the tables of a pattern take, length by length.

Legend: n tokens, S tokens of a tile or block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..attention.backends.triton.backend import tile_size
from ..pattern import Pattern
from ..pattern.base import Marks
from ..plan import BlockPlan, build_plan
from ..plan.tile_lists import Lists, TileLists, tile_lists
from ..units import duration, size
from .measure import Timer, chosen_device, measured, peak_bytes, print_row, why_not_run
from .plot import plot_result
from .results import Result, Row, environment, result_path, slopes, write_json
from .text import Figures, exponents

PATTERNS = ("window(256, 256)", "streaming(window=1024, sinks=4)", "longformer()", "bigbird()")
# what each table is to take at so many tokens: seconds, and bytes of memory, by the kind of device
# that holds it
GOAL_TOKENS, GOALS = 1 << 20, {"cpu": (2.0, 200e6), "cuda": (0.05, 100e6)}
# queries, and keys, whose pairs are compared with the pattern before anything is timed
COMPARED_TOKENS = 32


def run_plan(
    patterns: Sequence[str] = PATTERNS,
    lengths: Sequence[int] = (16384, 65536, 262144, 1048576),
    *,
    device: str | None = None,
    repeats: int = 3,
    budget: float = 60.0,
    out: str | Path | None = None,
    plot: str | Path | None = None,
) -> Result:
    """Time the making of tables over `lengths`, print a table, and write the figures.

    Each pattern has two rows, each of which begins with `build_plan` and nothing remembered.
    "blocks" are the lists that `blockwise` and `flex` loop over, made on the CPU wherever they are
    wanted; "tiles" are those that the kernels of `triton` read, distinct masks included, which on a
    CPU only tests ask for. Of some random queries and keys the pairs in the tables are compared
    with the pattern itself before a row is timed. Peak memory is that of the device; on a GPU the
    host's is noted beside it.

    Args:
        patterns: texts of patterns; those that choose pairs by content (`lsh`) have no plan
            beforehand.
        lengths: tokens n.
        device: "cpu" or "cuda", which is to hold the tables; by default the GPU if there is one.
        repeats: timed calls per figure, of which the median counts.
        budget: seconds; a pattern that needed more for one call is not planned for longer texts.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-plan.json`.
        plot: where to draw it (PNG); needs matplotlib.

    Raises:
        ValueError: a bad pattern, an unknown device, or a length below 1.
        AssertionError: tables that hold other pairs than the pattern.
    """
    wrong = [n for n in lengths if n < 1]
    if wrong:
        raise ValueError(f"lengths holds {wrong[0]}; a plan needs at least 1 token")
    names = dict.fromkeys(patterns)
    for name in names:
        build_plan(name, 1)
    timer = Timer(chosen_device(device), repeats, budget)
    console, facts = Console(stderr=True), environment(timer.device)
    rows: list[Row] = []
    result = {
        "benchmark": "plan",
        "environment": facts,
        "device": timer.device.type,
        "patterns": {name: str(Pattern.parse(name)) for name in names},
        "rows": rows,
    }
    for name, n, kind in product(names, sorted(lengths), MAKERS):
        row: Row = {"model": name, "name": f"{name}: {kind}", "kind": kind, "n": n}
        reason = why_not_run(row, rows, ("build_s",), budget)
        with console.status(f"{row['name']}, n = {n:,}"):
            rows.append({**row, "failed": reason} if reason else measured(row, partial(_figures, name, n, kind, timer)))
        print_row(rows[-1], lambda row: f"{row['build_s'] * 1e3:,.2f} ms", console)
        result["slopes"] = slopes(rows, ("build_s", "peak_bytes"))
        if out:
            # what is measured stays, whatever happens to the next row
            write_json(result, result_path(out, facts, "plan"))
    _table(result).print(Console())
    if plot:
        plot_result(result, "tables of a plan", plot, ("build_s", "making the tables"))
    return result


Tables = TileLists | tuple[Tensor, ...]


def _blocks(plan: BlockPlan) -> tuple[Tensor, ...]:
    return plan.row_offsets, plan.columns, plan.full


def _tiles(plan: BlockPlan) -> TileLists:
    return tile_lists(plan, tile_size(plan), 1, len(plan.heads) or 1)


MAKERS: dict[str, Callable[[BlockPlan], Tables]] = {"blocks": _blocks, "tiles": _tiles}


def _figures(name: str, n: int, kind: str, timer: Timer) -> Row:
    def work():
        return MAKERS[kind](build_plan(name, n, device=timer.device))

    found: Row = {
        **_checked(name, n, kind, timer.device),
        "build_s": timer.seconds(work),
        "peak_bytes": peak_bytes(work, timer.device),
    }
    if timer.device.type == "cuda":
        found["host_peak_bytes"] = peak_bytes(work, torch.device("cpu"))
    if n == GOAL_TOKENS:
        most_s, most_bytes = GOALS[timer.device.type]
        found["within_goal"] = found["build_s"] <= most_s and (found["peak_bytes"] or 0) <= most_bytes
    return found


def _checked(name: str, n: int, kind: str, device: torch.device) -> dict[str, int]:
    """What the tables hold, once random pairs were compared with the pattern."""
    plan = build_plan(name, n, device=device)
    tables = MAKERS[kind](plan)
    chosen = torch.randint(n, (COMPARED_TOKENS,), generator=torch.Generator().manual_seed(n)).to(device)
    every = torch.arange(n, device=device)
    for p, pattern in enumerate(plan.patterns):
        for x in chosen:
            for what, found in _lines(plan, tables, p, x):
                pair = (x, every) if what == "query" else (every, x)
                right = pattern.allows(*pair, Marks(length=n)).expand(n)
                if not torch.equal(found[:n], right):
                    raise AssertionError(
                        f"{name} at n={n}: of {what} {int(x)} the {kind} hold {int(found[:n].sum())} pairs, which are not "
                        f"the {int(right.sum())} of the pattern"
                    )
    tensors = list(_tensors(tables))
    listed = tables.by_query.others if isinstance(tables, TileLists) else plan.columns
    return {"table_bytes": sum(t.numel() * t.element_size() for t in tensors), "entries": len(listed)}


def _lines(plan: BlockPlan, tables: Tables, p: int, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The pairs that tables hold, `[at least n]` bool, of query x and of key x.

    Of key x only where they are listed by key too.
    """
    if isinstance(tables, TileLists):
        yield "query", _of_tiles(plan.kv_len, tables.by_query, tables.masks, p, x)
        yield "key", _of_tiles(plan.q_len, tables.by_key, tables.masks_by_key, p, x)
    else:
        yield "query", _of_blocks(plan, p, x)


def _of_blocks(plan: BlockPlan, p: int, x: Tensor) -> Tensor:
    row, size = p * plan.q_blocks + int(x) // plan.block_size, plan.block_size
    listed = slice(*plan.row_offsets[row : row + 2].tolist())
    columns = plan.columns[listed].long()[:, None]
    keys = (columns * size + torch.arange(size, device=plan.device)).clamp(max=plan.kv_len - 1)
    # the pairs of a partial block are the pattern's own
    held = plan.full[listed, None] | plan.patterns[p].allows(x, keys, Marks(length=plan.kv_len))
    return _spread(plan.kv_blocks, columns[:, 0], held)


def _of_tiles(n: int, lists: Lists, masks: Tensor, p: int, x: Tensor) -> Tensor:
    line, size = p * lists.lines + int(x) // masks.shape[1], masks.shape[1]
    first, last = lists.offsets[line : line + 2].tolist()
    masked = int(lists.masked[line])
    held = torch.ones(last - first, size, dtype=torch.bool, device=x.device)
    held[:masked] = masks[lists.masks[first : first + masked].long(), x % size].bool()
    return _spread(-(-n // size), lists.others[first:last].long(), held)


def _spread(count: int, columns: Tensor, held: Tensor) -> Tensor:
    """Pairs of the listed blocks, `[N, S]`, among those of all `count` blocks."""
    seen = held.new_zeros(count, held.shape[1])
    seen[columns] = held
    return seen.flatten()


def _tensors(tables: object) -> Iterator[Tensor]:
    if isinstance(tables, Tensor):
        yield tables
    elif not isinstance(tables, int):
        for member in tables if isinstance(tables, tuple) else vars(tables).values():
            yield from _tensors(member)


def _table(result: Result) -> Figures:
    memory = ("peak_bytes", "host_peak_bytes", "table_bytes")
    columns = ("", "time", "peak", "host's", "size", "entries", "goal")
    table = Figures(f"tables of a plan on {result['device']}, {result['environment']['hardware']}", columns)
    for row in result["rows"]:
        group = f"{row['model']}, {row['n']:,} tokens"
        if row.get("failed"):
            table.fail(group, row["kind"], row["failed"])
            continue
        goal = {None: "", True: "met", False: "missed"}[row.get("within_goal")]
        table.add(
            group,
            row["kind"],
            duration(row["build_s"]),
            *(size(row.get(key)) for key in memory),
            f"{row['entries']:,}",
            goal,
        )
    most_s, most_bytes = GOALS[result["device"]]
    goal = f"goal at {GOAL_TOKENS:,} tokens: {duration(most_s)} and {size(round(most_bytes))}"
    table.notes += [goal, *exponents(result, "build_s")]
    return table
