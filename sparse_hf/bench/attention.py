"""`sparse-hf bench attention`: one layer beside dense SDPA, length by length.

Legend: H query heads, G key heads, n tokens, D head dim, E head dim of values.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..attention import BACKENDS
from ..pattern import Pattern, causal, full
from ..plan import build_plan, most_row_counts
from ..units import duration, times
from .exactness import row_error
from .measure import DTYPES, Timer, check_dtype, chosen_device, measured, peak_bytes, synchronize
from .peers import Peer, peers
from .plot import plot_result, readable
from .results import Result, Row, environment, result_path, slopes, write_json
from .sparse_peers import sparse_peers
from .text import Figures, exponents

# largest relative error of an output row against float64 that still counts as correct
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}


@dataclass(frozen=True)
class LayerShape:
    """Heads of one attention layer, and the name of its dtype in `DTYPES`."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str

    def tensors(self, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random q `[1, H, n, D]`, k `[1, G, n, D]` and v `[1, G, n, E]`, the same for every run."""
        generator, (heads, kv_heads) = torch.Generator(device).manual_seed(n), (self.heads, self.kv_heads)
        shapes = (heads, n, self.head_dim), (kv_heads, n, self.head_dim), (kv_heads, n, self.value_dim)
        q, k, v = (self._tensor(shape, generator, device) for shape in shapes)
        return q, k, v

    def _tensor(self, shape: tuple[int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        made = torch.randn((1, *shape), generator=generator, device=device).to(DTYPES[self.dtype])
        # heads after tokens, as the projections of a model make them
        return made.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def run_attention(
    lengths: Sequence[int] = (4096, 16384, 65536),
    pattern: str = "window(511, 0)",
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: str = "fp32",
    device: str | None = None,
    backends: Sequence[str] | None = None,
    repeats: int = 3,
    budget: float = 60.0,
    out: str | Path | None = None,
    plot: str | Path | None = None,
) -> Result:
    """Time attention over `lengths`, print a table, and write the figures.

    Beside ours run dense SDPA (causal if the pattern is), until one call would take longer than
    `budget` seconds, on a GPU the window kernels of others on the pattern's window alone, and the
    sparse attention of other packages, as far as they are installed and can run the call. Every
    output and gradient of q is compared with float64 rows before it is timed, and a wrong one is an
    error.

    Args:
        lengths: sequence lengths, ascending.
        pattern: text of the pattern.
        heads, kv_heads, head_dim: of the layer; `kv_heads` defaults to `heads`.
        value_dim: the head dim of values, by default that of queries and keys.
        dtype: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda"; by default the GPU if there is one.
        backends: by default all that can run here but the reference.
        repeats: timed calls per figure, of which the median counts.
        budget: seconds per figure.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-attention.json`.
        plot: where to draw it (PNG); needs matplotlib.

    Raises:
        ValueError: an unknown dtype, device or backend.
        AssertionError: a backend computes something else than the pattern.
    """
    check_dtype(dtype)
    unknown = sorted(set(backends or ()) - set(BACKENDS))
    if unknown:
        raise ValueError(f"unknown backends {unknown}; the known ones are {', '.join(BACKENDS)}")
    timer = Timer(chosen_device(device), repeats, budget)
    shape = LayerShape(heads, kv_heads or heads, head_dim, value_dim or head_dim, dtype)
    console, asked = Console(stderr=True), Pattern.parse(pattern)
    rows: list[Row] = []
    # installed packages that cannot stand beside ours here, and why
    left_out: dict[str, str] = {}
    facts = environment(timer.device)
    result = {"benchmark": "attention", "environment": facts, "pattern": str(asked), **asdict(shape), "rows": rows}
    result["left_out"] = left_out
    for n in sorted(lengths):
        with console.status(f"n = {n:,}"):
            tensors = shape.tensors(n, timer.device)
            sparse, reasons = sparse_peers(asked, *tensors[:2]) if shape.value_dim == head_dim else ([], {})
            left_out.update(reasons)
            beside = chain(peers(asked, *tensors, list(backends) if backends else None), sparse)
            rows += [_timed(p, shape, tensors, timer) for p in beside if not _takes_too_long(p, n, rows, budget)]
        _add_ratios(rows)
        result["slopes"] = slopes(rows, ("forward_s", "step_s", "peak_bytes"))
        if out:
            # what is measured stays, whatever happens at the next length
            write_json(result, result_path(out, facts, "attention"))
    _table(result).print(Console())
    for name, reason in left_out.items():
        console.print(f"{name} is installed, but left out: {reason}", highlight=False, soft_wrap=True, markup=False)
    if plot:
        sizes = f"{heads} heads of {head_dim}, {shape.kv_heads} key heads, {dtype}"
        plot_result(result, f"{result['pattern']}: {sizes}", plot)
    return result


def _takes_too_long(peer: Peer, n: int, earlier: Sequence[Row], budget_s: float) -> bool:
    """Is a call expected to pass the budget? Dense work grows with n^2."""
    if peer.kind != "dense" or not earlier:
        return False
    before = next((r for r in reversed(earlier) if r["name"] == peer.name), None)
    if before is None or before.get("failed"):
        return True
    return before["step_s"] * (n / before["n"]) ** 2 >= budget_s


def _timed(peer: Peer, shape: LayerShape, tensors: tuple[Tensor, Tensor, Tensor], timer: Timer) -> Row:
    row: Row = {"name": peer.name, "kind": peer.kind, "n": tensors[0].shape[2]}
    # dense kernels of PyTorch may have none for these head dims, forward or backward
    refusals = (RuntimeError,) if peer.kind == "dense" else ()
    # the backward pass chooses kernels too
    with peer.context():
        return measured(row, lambda: _figures(peer, shape, tensors, timer), refusals)


def _figures(peer: Peer, shape: LayerShape, tensors: tuple[Tensor, Tensor, Tensor], timer: Timer) -> Row:
    n, device = tensors[0].shape[2], timer.device
    q = tensors[0]
    generator = torch.Generator(device).manual_seed(n + 1)
    grad = torch.randn((*q.shape[:3], shape.value_dim), generator=generator, device=device).to(q.dtype)
    first_call_s, errors = _checked(peer, shape, tensors, grad, device)
    with torch.no_grad():
        forward = timer.seconds(lambda: peer.call(*tensors))

    def forget():
        for t in tensors:
            t.grad = None

    def step():
        forget()
        peer.call(*tensors).backward(grad)

    both = peak = None
    if peer.has_backward:
        both = timer.seconds(step)
        forget()
        peak = peak_bytes(step, device)
        forget()
    given = sum(t.numel() * t.element_size() for t in (*tensors, grad))
    # what any implementation must hold: q, k, v, out and the gradients of the four
    held = 2 * given
    pairs = _pairs(str(peer.pattern), n)
    # multiplications and additions of both products of a pair, forward; the backward pass has five
    # more products, three of them over keys
    flops = 2 * shape.heads * pairs * (shape.head_dim + shape.value_dim)
    step_flops = 2 * shape.heads * pairs * (4 * shape.head_dim + 3 * shape.value_dim)
    return {
        "forward_s": forward,
        "step_s": both,
        # kernels are compiled in it, forward and backward, if a length before has not done it
        "first_call_s": first_call_s,
        "useful_tflops_forward": flops / forward / 1e12,
        "useful_tflops_step": None if both is None else step_flops / both / 1e12,
        "pairs": pairs,
        "relative_error": errors[0],
        "relative_error_grad_q": errors[1],
        "peak_bytes": peak,
        "extra_bytes": None if peak is None else max(0, peak - (held - given)),
        "held_bytes": held,
    }


def _checked(
    peer: Peer, shape: LayerShape, tensors: tuple[Tensor, Tensor, Tensor], grad: Tensor, device: torch.device
) -> tuple[float, tuple[float, float | None]]:
    """Seconds of the first call, and relative errors of its output and gradient of q.

    They must be within `TOLERANCE`.
    """
    q, k, v = tensors
    begin = time.perf_counter()
    out = peer.call(q, k, v)
    grad_q = torch.autograd.grad(out, q, grad)[0] if peer.has_backward else None
    synchronize(device)
    first_call_s = time.perf_counter() - begin
    n, bound = q.shape[2], TOLERANCE[shape.dtype]
    errors = row_error(q, k, v, peer.pattern, out, grad, grad_q, peer.chosen_by(k.detach()))
    known = [error for error in errors if error is not None]
    # NaN is no more than any bound, and no less
    if not all(error <= bound for error in known):
        found = ", ".join(f"{error:.1e}" for error in known)
        raise AssertionError(f"{peer.name} at n={n}: output and gradient are off by {found}; {bound:.0e} is right")
    return first_call_s, errors


@lru_cache
def _pairs(pattern: str, n: int) -> int:
    if pattern == str(causal()):
        return n * (n + 1) // 2
    if pattern == str(full()):
        return n * n
    asked = Pattern.parse(pattern)
    if asked.uses_content:
        return int(most_row_counts(asked, n).sum())
    plan = build_plan(pattern, n)
    # of heads with patterns of their own the mean
    counts, heads = plan.row_counts().sum((0, 2)).tolist(), plan.heads or (0,)
    return round(sum(counts[p] for p in heads) / len(heads))


def _add_ratios(rows: Sequence[Row]) -> None:
    """Add the rate of ours over the fastest window peer's, and dense time over ours.

    A window peer computes no more than the window.
    """
    timed = [r for r in rows if not r.get("failed")]
    for row in (r for r in timed if r["kind"] == "ours"):
        beside = [r for r in timed if r["n"] == row["n"]]
        for what in ("forward", "step"):
            rate, time_s = f"useful_tflops_{what}", f"{what}_s"
            fast = max((r[rate] for r in beside if r["kind"] == "window" and r[rate]), default=None)
            dense = min((r[time_s] for r in beside if r["kind"] == "dense"), default=None)
            row[f"{what}_rate_over_window_peer"] = None if fast is None else row[rate] / fast
            row[f"{what}_dense_over_ours"] = None if dense is None else dense / row[time_s]


def _table(result: Result) -> Figures:
    # older files say nothing of values
    of_values = result.get("value_dim", result["head_dim"])
    values = "" if of_values == result["head_dim"] else f" (values {of_values})"
    heads = f"{result['heads']} heads of {result['head_dim']}{values}, {result['dtype']}"
    columns = ("", "forward", "+ backward", "TFLOP/s", "faster", "of window", "memory", "error")
    table = Figures(f"{result['pattern']}: {heads}, {result['environment']['hardware']}", columns)
    for row in result["rows"]:
        if row.get("failed"):
            table.fail(f"{row['n']:,} tokens", readable(row), row["failed"])
            continue
        spent = (duration(row[key]) for key in ("forward_s", "step_s"))
        rate = row["useful_tflops_step"] or row["useful_tflops_forward"]
        of_peer = row.get("step_rate_over_window_peer") or row.get("forward_rate_over_window_peer")
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / row['held_bytes']:.2f}"
        faster = times(row.get("step_dense_over_ours") or row.get("forward_dense_over_ours"))
        of_window = "" if of_peer is None else f"{of_peer:.2f}"
        figures = (f"{rate:.3g}", faster, of_window, extra, f"{row['relative_error']:.0e}")
        table.add(f"{row['n']:,} tokens", readable(row), *spent, *figures)
    table.notes.append("faster: than dense; memory: beyond q, k, v, output and gradients, by their size")
    if any(row["kind"] == "window" for row in result["rows"]):
        table.notes.append("of window: the rate of ours by that of the fastest window kernel")
    table.notes += exponents(result, "step_s")
    return table
