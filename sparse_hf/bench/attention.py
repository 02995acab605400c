"""`sparse-hf bench attention`: one attention layer, ours beside dense SDPA, forward and backward, length by length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..attention import BACKENDS
from ..pattern import Pattern, causal, full
from ..plan import build_plan
from .measure import DTYPES, environment, peak_bytes, row_error, seconds, slopes, synchronize, write_json
from .peers import Peer, peers
from .plot import plot_result
from .sparse_peers import sparse_peers

# largest relative error of an output row against float64 that still counts as correct
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}


def run_attention(
    lengths: Sequence[int] = (4096, 16384, 65536),
    pattern: str = "window(511, 0)",
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "fp32",
    device: str | None = None,
    backends: Sequence[str] | None = None,
    repeats: int = 3,
    budget: float = 60.0,
    out: str | Path | None = None,
    plot: str | Path | None = None,
) -> dict:
    """Time attention over `lengths`, print a table, and write the figures to `out` (JSON) and `plot` (PNG).

    Beside ours run dense SDPA (causal if the pattern is), until one call would take longer than `budget` seconds, on a GPU
    the window kernels of others on the pattern's window alone, and the sparse attention of other packages, as far as they
    are installed and can run the call. Every output and gradient of q is compared with float64 rows before it is timed, and
    a wrong one is an error.

    Args:
        lengths: sequence lengths, ascending.
        pattern: text of the pattern.
        heads, kv_heads, head_dim: of the layer; `kv_heads` defaults to `heads`.
        dtype: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda"; by default the GPU if there is one.
        backends: by default all that can run here but the reference.
        repeats: timed calls per figure, of which the median counts.
        budget: seconds per figure.
        out: where to write the result.
        plot: where to draw it; needs matplotlib.

    Raises:
        ValueError: an unknown dtype or backend.
        AssertionError: a backend computes something else than the pattern.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; the known ones are {', '.join(DTYPES)}")
    unknown = sorted(set(backends or ()) - set(BACKENDS))
    if unknown:
        raise ValueError(f"unknown backends {unknown}; the known ones are {', '.join(BACKENDS)}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backends = list(backends) if backends else None
    console = Console(stderr=True)
    shape = {"heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim, "dtype": dtype}
    rows, left_out, text = [], {}, str(Pattern.parse(pattern))
    result = {"benchmark": "attention", "environment": environment(place), "pattern": text, **shape, "rows": rows}
    # installed packages that cannot stand beside ours here
    result["left_out"] = left_out
    for n in sorted(lengths):
        with console.status(f"n = {n:,}"):
            rows += _one_length(n, pattern, shape, place, backends, repeats, budget, rows, left_out)
        _ratios(rows)
        result["slopes"] = slopes(rows, ("forward_s", "step_s", "peak_bytes"))
        if out:
            # what is measured stays, whatever happens at the next length
            write_json(result, out)
    Console(width=max(Console().width, 124)).print(_table(result))
    for name, reason in left_out.items():
        console.print(f"{name} is installed, but left out: {reason}", highlight=False, soft_wrap=True, markup=False)
    if plot:
        sizes = f"{heads} heads of {head_dim}, {shape['kv_heads']} key heads, {dtype}"
        plot_result(result, f"{result['pattern']}: {sizes}", plot)
    return result


def _one_length(n, pattern, shape, place, backends, repeats, budget, earlier, left_out) -> list[dict]:
    generator = torch.Generator(place).manual_seed(n)
    sizes = [(1, h, n, shape["head_dim"]) for h in (shape["heads"], shape["kv_heads"], shape["kv_heads"])]
    q, k, v = (torch.randn(size, generator=generator, device=place).to(DTYPES[shape["dtype"]]) for size in sizes)
    # heads after tokens, as the projections of a model make them
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    rows, asked = [], Pattern.parse(pattern)
    sparse, reasons = sparse_peers(asked, *tensors[:2])
    left_out.update(reasons)
    for peer in (*peers(asked, *tensors, backends), *sparse):
        before = next((r for r in reversed(earlier) if r["name"] == peer.name), None)
        # dense work grows with n^2: skip it once a call is expected to pass the budget
        if peer.kind == "dense" and earlier and not (before and before["step_s"] * (n / before["n"]) ** 2 < budget):
            continue
        rows.append(_figures(peer, tensors, n, shape, place, repeats, budget))
    return rows


def _figures(peer: Peer, tensors, n: int, shape, place, repeats, budget) -> dict:
    q, k, v = tensors
    grad = torch.randn(q.shape, generator=torch.Generator(place).manual_seed(n + 1), device=place).to(q.dtype)
    begin = time.perf_counter()
    out = peer.call(*tensors)
    grad_q = torch.autograd.grad(out, q, grad)[0] if peer.has_backward else None
    synchronize(place)
    first_call = time.perf_counter() - begin
    errors = row_error(q, k, v, out, build_plan(peer.pattern, n, device=q.device), grad, grad_q)
    known = [error for error in errors if error is not None]
    # NaN is no more than any bound, and no less
    if not all(error <= TOLERANCE[shape["dtype"]] for error in known):
        found = ", ".join(f"{error:.1e}" for error in known)
        raise AssertionError(
            f"{peer.name} at n={n}: output and gradient are off by {found}; {TOLERANCE[shape['dtype']]:.0e} is right"
        )
    del out, grad_q
    with torch.no_grad():
        forward = seconds(lambda: peer.call(*tensors), place, repeats, budget)

    def step():
        for t in tensors:
            t.grad = None
        peer.call(*tensors).backward(grad)

    both = seconds(step, place, repeats, budget) if peer.has_backward else None
    for t in tensors:
        t.grad = None
    # what any implementation must hold: q, k, v, out and the gradients of the four
    held = 4 * sum(t.numel() * t.element_size() for t in (q, k))
    given = sum(t.numel() * t.element_size() for t in (*tensors, grad))
    peak = peak_bytes(step, place) if peer.has_backward else None
    for t in tensors:
        t.grad = None
    pairs = _pairs(str(peer.pattern), n)
    return {
        "name": peer.name,
        "kind": peer.kind,
        "n": n,
        "forward_s": forward,
        "step_s": both,
        # kernels are compiled in it, forward and backward, if a length before has not done it
        "first_call_s": first_call,
        "useful_tflops_forward": 4 * shape["heads"] * shape["head_dim"] * pairs / forward / 1e12,
        "useful_tflops_step": both and 14 * shape["heads"] * shape["head_dim"] * pairs / both / 1e12,
        "pairs": pairs,
        "relative_error": errors[0],
        "relative_error_grad_q": errors[1],
        "peak_bytes": peak,
        "extra_bytes": None if peak is None else max(0, peak - (held - given)),
        "held_bytes": held,
    }


@lru_cache
def _pairs(pattern: str, n: int) -> int:
    if pattern == str(causal()):
        return n * (n + 1) // 2
    if pattern == str(full()):
        return n * n
    plan = build_plan(pattern, n)
    # of heads with patterns of their own the mean
    counts, heads = plan.row_counts().sum((0, 2)).tolist(), plan.heads or (0,)
    return round(sum(counts[p] for p in heads) / len(heads))


def _ratios(rows: list[dict]) -> None:
    """Useful rate of each of ours over the fastest peer's that computes no more than the window, and over dense time."""
    for row in (r for r in rows if r["kind"] == "ours"):
        beside = [r for r in rows if r["n"] == row["n"]]
        for what in ("forward", "step"):
            rate, time = f"useful_tflops_{what}", f"{what}_s"
            fast = max((r[rate] for r in beside if r["kind"] == "window" and r[rate]), default=None)
            dense = min((r[time] for r in beside if r["kind"] == "dense"), default=None)
            row[f"{what}_rate_over_window_peer"] = None if fast is None else row[rate] / fast
            row[f"{what}_dense_over_ours"] = None if dense is None else dense / row[time]


def _table(result: dict) -> Table:
    facts = result["environment"]
    title = (
        f"{result['pattern']}, {result['heads']} heads of {result['head_dim']}, {result['dtype']}, {facts['hardware']}"
    )
    table = Table(title=title)
    for column in (
        "n",
        "",
        "forward",
        "forward + backward",
        "TFLOP/s",
        "against dense",
        "of window peer",
        "extra memory / held",
        "error",
    ):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        rates = (row[key] for key in ("useful_tflops_forward", "useful_tflops_step"))
        rates = " / ".join("-" if rate is None else f"{rate:.3g}" for rate in rates)
        faster = row.get("step_dense_over_ours")
        of_peer = (row.get(f"{what}_rate_over_window_peer") for what in ("forward", "step"))
        of_peer = " / ".join("-" if rate is None else f"{rate:.2f}" for rate in of_peer)
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / row['held_bytes']:.2f}"
        times = ("" if row[key] is None else f"{row[key] * 1e3:,.2f} ms" for key in ("forward_s", "step_s"))
        beside = (f"{faster:.2f} x faster" if faster else "", "" if of_peer == "- / -" else of_peer)
        table.add_row(f"{row['n']:,}", row["name"], *times, rates, *beside, extra, f"{row['relative_error']:.0e}")
    fits = (f"{name} {fit['step_s']:.2f}" for name, fit in result["slopes"].items() if fit["step_s"])
    table.caption = "slope of time against n: " + ", ".join(fits)
    return table
