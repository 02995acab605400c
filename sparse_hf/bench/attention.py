"""`sparse-hf bench attention`: one attention layer, ours beside dense SDPA, forward and backward, length by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..attention import BACKENDS, sparse_attention
from ..pattern import Pattern
from ..plan import build_plan
from .measure import environment, peak_bytes, row_error, seconds, slope, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# largest relative error of an output row against float64 that still counts as correct
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}
DENSE = "sdpa_dense"


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
) -> dict:
    """Time attention over `lengths`, print a table, and write the figures to `out` (JSON).

    Every backend's output is compared with float64 rows before it is timed, and a wrong one is an error. Dense SDPA
    (causal if the pattern is) runs beside ours until one call would take longer than `budget` seconds.

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
    backends = list(backends or (["flex", "blockwise"] if place.type == "cuda" else ["blockwise"]))
    console = Console(stderr=True)
    shape = {"heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim, "dtype": dtype}
    rows = []
    for n in sorted(lengths):
        with console.status(f"n = {n:,}"):
            rows += _one_length(n, pattern, shape, place, backends, repeats, budget, rows)
    result = {
        "benchmark": "attention",
        "environment": environment(place),
        "pattern": str(Pattern.parse(pattern)),
        **shape,
        "rows": rows,
        "slopes": _slopes(rows),
    }
    Console().print(_table(result))
    if out:
        write_json(result, out)
    return result


def _one_length(n, pattern, shape, place, backends, repeats, budget, earlier) -> list[dict]:
    generator = torch.Generator(place).manual_seed(n)
    sizes = [(1, h, n, shape["head_dim"]) for h in (shape["heads"], shape["kv_heads"], shape["kv_heads"])]
    q, k, v = (
        torch.randn(size, generator=generator, device=place).to(DTYPES[shape["dtype"]]).requires_grad_()
        for size in sizes
    )
    plan = build_plan(pattern, n, device=place)
    parsed = Pattern.parse(pattern)
    far = torch.tensor([0, n - 1])
    is_causal = not bool(parsed.allows(far[:1], far[1:]).any()) and not bool(parsed.allows(far[:1], far[:1] + 1).any())
    calls: dict[str, Callable[[], Tensor]] = {
        name: (lambda name=name: sparse_attention(q, k, v, pattern, backend=name)) for name in backends
    }
    dense_before = next((r for r in reversed(earlier) if r["name"] == DENSE), None)
    # dense work grows with n^2: skip it once a call is expected to pass the budget
    if not earlier or (dense_before and dense_before["step_s"] * (n / dense_before["n"]) ** 2 < budget):
        calls[DENSE] = lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=shape["heads"] != shape["kv_heads"]
        )
    return [_figures(name, call, (q, k, v), plan, shape, place, repeats, budget) for name, call in calls.items()]


def _figures(name, call, tensors, plan, shape, place, repeats, budget) -> dict:
    n = plan.q_len
    with torch.no_grad():
        out = call()
        error = None if name == DENSE else row_error(*tensors, out, plan)
        if error is not None and error > TOLERANCE[shape["dtype"]]:
            raise AssertionError(
                f"{name} at n={n} is off by {error:.1e}; at most {TOLERANCE[shape['dtype']]:.0e} is right"
            )
        del out
        forward = seconds(lambda: call(), place, repeats, budget)
    grad = torch.ones(1, shape["heads"], n, shape["head_dim"], device=place, dtype=tensors[0].dtype)

    def step():
        for t in tensors:
            t.grad = None
        call().backward(grad)

    both = seconds(step, place, repeats, budget)
    for t in tensors:
        t.grad = None
    # what any implementation must hold: q, k, v, out and the gradients of the four
    held = 4 * sum(t.numel() * t.element_size() for t in (tensors[0], tensors[1]))
    given = sum(t.numel() * t.element_size() for t in (*tensors, grad))
    peak = peak_bytes(step, place)
    pairs = n * (n + 1) // 2 if name == DENSE else plan.pairs
    return {
        "name": name,
        "n": n,
        "forward_s": forward,
        "step_s": both,
        "useful_tflops_forward": 4 * shape["heads"] * shape["head_dim"] * pairs / forward / 1e12,
        "useful_tflops_step": 14 * shape["heads"] * shape["head_dim"] * pairs / both / 1e12,
        "pairs": pairs,
        "relative_error": error,
        "peak_bytes": peak,
        "extra_bytes": None if peak is None else max(0, peak - (held - given)),
        "held_bytes": held,
    }


def _slopes(rows: list[dict]) -> dict:
    slopes = {}
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name]
        lengths = [r["n"] for r in mine]
        slopes[name] = {
            key: slope(lengths, [r[key] or 0 for r in mine]) for key in ("forward_s", "step_s", "peak_bytes")
        }
    return slopes


def _table(result: dict) -> Table:
    facts = result["environment"]
    title = (
        f"{result['pattern']}, {result['heads']} heads of {result['head_dim']}, {result['dtype']}, {facts['hardware']}"
    )
    table = Table(title=title)
    for column in ("n", "backend", "forward", "forward + backward", "against dense", "extra memory / held", "error"):
        table.add_column(column, justify="right")
    dense = {r["n"]: r for r in result["rows"] if r["name"] == DENSE}
    for row in result["rows"]:
        beside = dense.get(row["n"])
        faster = f"{beside['step_s'] / row['step_s']:.2f} x faster" if beside and row["name"] != DENSE else ""
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / row['held_bytes']:.2f}"
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
        times = (f"{row[key] * 1e3:,.1f} ms" for key in ("forward_s", "step_s"))
        table.add_row(f"{row['n']:,}", row["name"], *times, faster, extra, error)
    fits = (f"{name} {fit['step_s']:.2f}" for name, fit in result["slopes"].items() if fit["step_s"])
    table.caption = "slope of time against n: " + ", ".join(fits)
    return table
