"""`sparse-hf bench models`: whole models, ours beside Transformers' class with the same weights, forward and training step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..models import sparsify
from .cases import CASES, VOCABULARY, Case
from .measure import DTYPES, environment, held_bytes, measured, peak_bytes, seconds, slopes, tell, write_json
from .plot import plot_result

# tokens on which both are compared before anything is timed: no length for which Transformers' BigBird draws a block twice
CHECKED = 1280
# how far from Transformers in float32 ours may be, as a multiple of how far Transformers itself is in the same dtype; in
# float32 itself, where that is 0, the number below
FACTOR, EXACT = 2.0, 1e-4
# attention that cannot be trained on a device: PyTorch says so as well, after half a minute of compiling
NO_BACKWARD = {
    ("flex_attention", "cpu"): "not run: PyTorch's FlexAttention has no backward on CPUs; without training it runs"
}
# what Transformers and PyTorch raise where an implementation is absent, does not fit the model or cannot do what is asked
REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)


def run_models(
    models: Sequence[str] = ("longformer", "big_bird", "bert"),
    lengths: Sequence[int] = (4096, 16384),
    *,
    layers: int = 12,
    batch: int = 1,
    dtype: str = "fp32",
    device: str | None = None,
    training: bool = True,
    compile_mode: str | None = None,
    checkpointing: bool = False,
    repeats: int = 3,
    budget: float = 60.0,
    out: str | Path | None = None,
    plot: str | Path | None = None,
) -> dict:
    """Time models over `lengths`, print a table, and write the figures to `out` (JSON) and `plot` (PNG).

    Each model of base size with random weights runs as Transformers' class and, with the same weights, as ours. Before that,
    outputs and the gradient of the embeddings at 1,280 tokens are compared with Transformers' class in float32: ours may be
    no farther from it than twice as far as Transformers is itself in `dtype`. A length that does not fit is noted as such.

    "modernbert" and "mistral", which slide in Transformers too, run there in each attention implementation that slides. One
    other than the class's default must keep to the same bound; one that does not, or refuses, has rows that say so instead of
    times. Their rows of ours have ratios to each under "beside", and under "fastest" which of these is.

    Args:
        models: names of `CASES`. "bert" is dense there and has a window and a global token here.
        lengths: tokens, ascending.
        layers, batch: of the model, and rows of a batch.
        dtype: "fp32", "bf16" or "fp16", of weights and activations.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        training: time a training step (forward and backward) as well.
        checkpointing: keep no activations inside layers (gradient checkpointing), in classes that support it, as each row says.
        compile_mode: time ours under `torch.compile` in this mode ("default", "reduce-overhead"), and Transformers' class with and
            without; ratios are to the faster. The third call of each, which CUDA graphs replay, is compared with itself
            uncompiled first, at every length. Peak memory counts what they hold between calls.
        repeats: timed calls per figure, of which the median counts.
        budget: seconds; a model that needed more for one call is not run on longer texts.
        out, plot: where to write the result, and to draw it (needs matplotlib).

    Raises:
        ValueError: an unknown model or dtype.
        AssertionError: ours computes something else than Transformers.
    """
    unknown = sorted(set(models) - set(CASES))
    if unknown:
        raise ValueError(f"unknown models {unknown}; the known ones are {', '.join(CASES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; the known ones are {', '.join(DTYPES)}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = {
        "layers": layers, "batch": batch, "dtype": dtype, "training": training, "compile_mode": compile_mode,
        "checkpointing": checkpointing,
    }  # fmt: skip
    console, rows, errors = Console(stderr=True), [], {}
    result = {"benchmark": "models", "environment": environment(place), **shape, "errors": errors, "rows": rows}
    for name in models:
        with console.status(f"{name}: comparing"):
            errors[name] = _compare(CASES[name], layers, dtype, place, training)
        others = {other: errors[name][other] for other in CASES[name].implementations[1:]}
        refused = [
            {"name": _transformers(name, other, mode), **found}
            for other, found in others.items()
            for mode in {None, compile_mode}
            if found.get("failed")
        ]
        for n in sorted(lengths):
            with console.status(f"{name}: n = {n:,}"):
                rows += _one_length(name, n, shape, errors[name], place, repeats, budget, refused + rows, console)
            _ratios(rows)
            result["slopes"] = slopes(rows, ("forward_s", "step_s", "peak_bytes"))
            if out:
                # what is measured stays, whatever happens to the next model
                write_json(result, out)
    # wide enough for all columns, in a narrow window or a pipe too
    Console(width=max(Console().width, 140)).print(_table(result))
    if plot:
        plot_result(result, f"{layers} layers, hidden size 768 or 1,024, {batch} row(s), {dtype}", plot)
    return result


def _build(
    case: Case, n: int, layers: int, dtype: torch.dtype, place: torch.device, implementation: str | None = None
) -> nn.Module:
    torch.manual_seed(0)
    model_class = getattr(transformers, case.model)
    with place:
        config = model_class.config_class(**case.config(n, layers), attn_implementation=implementation)
        model = model_class(config)
    return model.to(place, dtype).train()


def _tokens(case: Case, n: int, batch: int, place: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(n)).to(place)
    if not case.global_tokens:
        return {"input_ids": ids}
    marks = torch.zeros_like(ids)
    marks[:, : case.global_tokens] = 1
    return {"input_ids": ids, "global_attention_mask": marks}


def _compare(case: Case, layers: int, dtype: str, place: torch.device, training: bool) -> dict[str, float | dict]:
    """Relative errors of output and gradient against Transformers in float32: Transformers' own in `dtype`, and ours.

    Under the name of each other implementation of Transformers are its errors, or what is "failed" about it.
    """
    stock = _build(case, CHECKED, layers, torch.float32, place, case.implementations[0])
    given = _tokens(case, CHECKED, 1, place)
    masks = case.masks(CHECKED, place)
    right = _results(stock, {**given, **masks})
    stock = stock.to(DTYPES[dtype])
    theirs = _errors(_results(stock, {**given, **masks}), right)
    sparse = sparsify(stock, case.pattern, **case.same(stock.config, CHECKED))
    ours = _errors(_results(sparse, given), right)
    wrong = _wrong(ours, theirs, dtype)
    if wrong:
        raise AssertionError(f"{case.model}: {wrong}")
    names = ("transformers_output", "transformers_gradient", "output", "gradient")
    found = dict(zip(names, (*theirs, *ours), strict=True))

    def check(other: str) -> dict:
        if training and (other, place.type) in NO_BACKWARD:
            return {"failed": NO_BACKWARD[other, place.type]}
        model = _build(case, CHECKED, layers, DTYPES[dtype], place, other)
        errors = _errors(_results(model, {**given, **masks}, gradient=training), right)
        wrong = _wrong(errors, theirs, dtype)
        return {"failed": f"wrong: {wrong}"} if wrong else dict(zip(("output", "gradient"), errors, strict=False))

    for other in case.implementations[1:]:
        found[other] = measured({}, partial(check, other), [], (), 0.0, REFUSALS)
        _forget(place)
    return found


def _wrong(errors: tuple[float, ...], theirs: tuple[float, ...], dtype: str) -> str | None:
    for what, error, their in zip(("output", "gradient"), errors, theirs, strict=False):
        if not error <= max(FACTOR * their, EXACT):
            return f"{what} is off by {error:.1e}, Transformers' default in {dtype} by {their:.1e}"
    return None


def _results(model: nn.Module, inputs: dict, gradient: bool = True) -> tuple[Tensor, ...]:
    if not gradient:
        with torch.no_grad():
            return (_forward(model, inputs).float(),)
    weights = next(p for p in model.parameters() if p.shape[:1] == (VOCABULARY,))
    out = _forward(model, inputs)
    # what is behind a layer norm has almost no gradient of its mean or square
    (grad,) = torch.autograd.grad(out, weights, _direction(out))
    return out.detach().float(), grad.float()


def _forward(model: nn.Module, inputs: dict) -> Tensor:
    # hashes are drawn from torch's generator
    torch.manual_seed(0)
    return model(**inputs)[0]


def _direction(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)


def _errors(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[float, ...]:
    return tuple(float((a - b).norm() / b.norm()) for a, b in zip(got, right[: len(got)], strict=True))


def _forget(place: torch.device) -> None:
    """What was compiled, so that the next model is for its own length, and memory that nothing holds."""
    torch._dynamo.reset()
    if place.type == "cuda":
        torch.cuda.empty_cache()


def _transformers(name: str, implementation: str | None, mode: str | None = None) -> str:
    return f"{name}, transformers" + (f" ({implementation})" if implementation else "") + _compiled(mode)


def _compiled(mode: str | None) -> str:
    return ", compiled" if mode else ""


def _one_length(
    name, n: int, shape: dict, errors: dict, place, repeats, budget: float, earlier: list[dict], console
) -> list[dict]:
    case, rows, mode = CASES[name], [], shape["compile_mode"]
    stock = "dense" if case.dense else "transformers"
    modes = (None, mode) if mode else (None,)
    variants = [(stock, implementation, of) for implementation in case.implementations for of in modes]
    for kind, implementation, of in (*variants, ("ours", None, mode)):
        label = f"{name}, sparse_hf" + _compiled(of) if kind == "ours" else _transformers(name, implementation, of)
        row = {"model": name, "name": label, "kind": kind, "n": n}
        row |= {"implementation": implementation} if implementation else {}
        row |= {"compile_mode": of} if mode else {}
        work = partial(_figures, case, row, shape, errors, place, repeats, budget)
        may_refuse = implementation in case.implementations[1:] or (of and kind != "ours")
        rows.append(measured(row, work, earlier, ("forward_s", "step_s"), budget, REFUSALS if may_refuse else ()))
        tell(rows[-1], _told, console)
        _forget(place)
    return rows


def _told(row: dict) -> str:
    step = "" if row["step_s"] is None else f", step {row['step_s'] * 1e3:,.1f} ms"
    memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:,.0f} MiB"
    return f"forward {row['forward_s'] * 1e3:,.1f} ms{step}{memory}"


def _figures(case: Case, row: dict, shape: dict, errors: dict, place, repeats: int, budget: float) -> dict:
    n, mode = row["n"], row.get("compile_mode")
    model = _build(case, n, shape["layers"], DTYPES[shape["dtype"]], place, row.get("implementation"))
    if row["kind"] == "ours":
        model = sparsify(model, case.pattern)
    inputs = _tokens(case, n, shape["batch"], place)
    run, before, found = model, held_bytes(place), {}
    if shape["checkpointing"]:
        # Transformers' Reformer, whose layers are reversible, has none
        found["checkpointing"] = model.supports_gradient_checkpointing
        if found["checkpointing"]:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
    if mode:
        run = torch.compile(model, mode=mode)
        right = _results(model, inputs, gradient=shape["training"])
        # a CUDA graph is warmed up by a first call and recorded by a second; what is timed is what replays it
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            again = tuple(t.clone() for t in _results(run, inputs, gradient=shape["training"]))
        found["against_uncompiled"] = _errors(again, right)
        wrong = _wrong(
            found["against_uncompiled"],
            (errors["transformers_output"], errors["transformers_gradient"]),
            shape["dtype"],
        )
        if wrong:
            raise AssertionError(f"{row['name']}, n = {n}, in mode {mode}: {wrong}")
        del right, again

    @torch.no_grad()
    def forward():
        model.eval()
        return run(**inputs)[0]

    grad = _direction(forward())

    def step():
        model.train()
        model.zero_grad(set_to_none=True)
        run(**inputs)[0].backward(grad)

    found |= {"forward_s": seconds(forward, place, repeats, budget), "forward_peak_bytes": peak_bytes(forward, place)}
    if shape["training"]:
        found |= {"step_s": seconds(step, place, repeats, budget)}
        model.zero_grad(set_to_none=True)
        found |= {"peak_bytes": peak_bytes(step, place), "tokens_per_s": shape["batch"] * n / found["step_s"]}
        # what weights take: 6 operations per weight and token (arXiv:2203.15556, appendix F), attention apart
        weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        found |= {"weights": weights, "weight_tflops": 6e-12 * weights * found["tokens_per_s"]}
    else:
        found |= {"step_s": None, "peak_bytes": found["forward_peak_bytes"]}
    if mode and place.type == "cuda":
        found["graphs_bytes"] = held_bytes(place) - before - grad.nbytes
        found["peak_bytes"] += found["graphs_bytes"]
    return found


def _ratios(rows: list[dict]) -> None:
    """How ours stands beside Transformers' class in its default implementation, and beside each that has a name and was timed."""
    for row in (r for r in rows if r["kind"] == "ours" and not r.get("failed")):
        others = [r for r in rows if r["model"] == row["model"] and r["n"] == row["n"] and r["kind"] != "ours"]
        names = dict.fromkeys(r.get("implementation") for r in others)
        # each at its fastest, which may be compiled or not
        timed = {
            name: min(found, key=_time)
            for name in names
            if (found := [r for r in others if r.get("implementation") == name and not r.get("failed")])
        }
        row |= _ratio(row, timed.get(next(iter(names)), {}))
        if named := {name: other for name, other in timed.items() if name}:
            row["beside"] = {name: _ratio(row, other) for name, other in named.items()}
            row["fastest"] = min(named, key=lambda name: _time(named[name]))


def _time(row: dict) -> float:
    return row["step_s"] or row["forward_s"]


def _ratio(mine: dict, other: dict) -> dict[str, float | None]:
    """How many times faster, and which part of the memory."""

    def part(key, a, b):
        return a[key] / b[key] if a.get(key) and b.get(key) else None

    faster = {f"{what}_times_faster": part(f"{what}_s", other, mine) for what in ("forward", "step")}
    return {**faster, "memory_ratio": part("peak_bytes", mine, other)}


def _table(result: dict) -> Table:
    what = f"{result['layers']} layers, {result['batch']} row(s), {result['dtype']}" + (
        f", compiled ({result['compile_mode']})" if result["compile_mode"] else ""
    )
    table = Table(title=f"{what}, {result['environment']['hardware']}")
    for column in ("n", "", "forward", "training step", "peak memory", "step faster", "forward faster", "memory"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        if row.get("failed"):
            table.add_row(f"{row['n']:,}", row["name"], row["failed"])
            continue
        times = ("" if row[key] is None else f"{row[key] * 1e3:,.1f} ms" for key in ("forward_s", "step_s"))
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        beside = row.get("beside", {})
        table.add_row(f"{row['n']:,}", row["name"], *times, peak, *([] if beside else _ratios_told(row)))
        for name, ratios in beside.items():
            which = f"beside {name}" + (", the fastest" if name == row["fastest"] and len(beside) > 1 else "")
            table.add_row("", which, "", "", "", *_ratios_told(ratios))
    fits = (
        f"{name} {fit['step_s'] or fit['forward_s']:.2f}" for name, fit in result["slopes"].items() if fit["forward_s"]
    )
    table.caption = "slope of time against n: " + ", ".join(fits)
    return table


def _ratios_told(ratios: dict) -> list[str]:
    found = (ratios.get(key) for key in ("step_times_faster", "forward_times_faster", "memory_ratio"))
    return ["" if ratio is None else f"{ratio:.2f} x" for ratio in found]
