"""`sparse-hf bench models`: whole models beside Transformers', same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from ..models import sparsify
from ..units import duration, size, times
from .cases import CASES, ERROR_FACTOR, VOCABULARY, Case, attending_by
from .measure import (
    DTYPES,
    Timer,
    check_dtype,
    chosen_device,
    forget_compiled,
    held_bytes,
    measured,
    peak_bytes,
    print_row,
    why_not_run,
)
from .plot import plot_result
from .results import Result, Row, environment, result_path, slopes, write_json
from .text import Figures, exponents

# how far from Transformers in float32 ours may be in float32 itself, where Transformers' own error is 0
EXACT_ERROR = 1e-4
# attention that cannot be trained on a device: PyTorch says so as well, after half a minute of
# compiling
NO_BACKWARD = {
    ("flex_attention", "cpu"): "not run: PyTorch's FlexAttention has no backward on CPUs; without training it runs"
}
# what Transformers and PyTorch raise where an implementation is absent, does not fit the model or
# cannot do what is asked
REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class ModelShape:
    """How every model is run; `dtype` is a name of `DTYPES`."""

    layers: int
    batch: int
    dtype: str
    training: bool
    compile_mode: str | None
    checkpointing: bool


@dataclass(frozen=True)
class Errors:
    """Relative errors against Transformers' class in float32.

    `stock` are its own in the dtype that is timed, output and gradient, and `ours` those of ours.

    `others` has those of Transformers' other attention implementations by name, or what is "failed"
    about one.
    """

    stock: tuple[float, ...]
    ours: tuple[float, ...]
    others: Mapping[str, dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        names = ("transformers_output", "transformers_gradient", "output", "gradient")
        return {**dict(zip(names, (*self.stock, *self.ours), strict=True)), **self.others}


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
) -> Result:
    """Time models over `lengths`, print a table, and write the figures.

    Each model of base size with random weights runs as Transformers' class and, with the same
    weights, as ours. Before that, outputs and the gradient of the embeddings at 1,280 tokens are
    compared with Transformers' class in float32: ours may be no farther from it than twice as far
    as Transformers is itself in `dtype`. A length that does not fit is noted as such.

    "modernbert", "mistral" and "gpt_oss", which slide in Transformers too, run there in each
    attention implementation that slides. One other than the class's default must keep to the same
    bound, and to ten times the default's error in "gpt_oss"; one that does not, or refuses, has rows
    that say so instead of times. Their rows of ours have ratios to each under "beside", and under
    "fastest" which of these is.

    Args:
        models: names of `CASES`. "bert", "whisper" (the encoder) and "vit" are dense there and have
            a window here; "gpt_oss_window" has a window in each layer, here and there.
        lengths: tokens, ascending; of "whisper" positions of 20 ms, of "vit" square pictures of
            patches and a class token: 197 is 224 x 224 pixels.
        layers, batch: of the model, and rows of a batch.
        dtype: "fp32", "bf16" or "fp16", of weights and activations.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        training: time a training step (forward and backward) as well.
        checkpointing: keep no activations inside layers (gradient checkpointing), in classes that
            support it, as each row says.
        compile_mode: time ours under `torch.compile` in this mode ("default", "reduce-overhead"),
            and Transformers' class with and without; ratios are to the faster. The third call of
            each, which CUDA graphs replay, is compared with itself uncompiled first, at every
            length. Peak memory counts what they hold between calls.
        repeats: timed calls per figure, of which the median counts.
        budget: seconds; a model that needed more for one call is not run on longer texts.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-models.json`.
        plot: where to draw it (PNG); needs matplotlib.

    Raises:
        ValueError: an unknown model, dtype or device.
        AssertionError: ours computes something else than Transformers.
    """
    unknown = sorted(set(models) - set(CASES))
    if unknown:
        raise ValueError(f"unknown models {unknown}; the known ones are {', '.join(CASES)}")
    check_dtype(dtype)
    timer = Timer(chosen_device(device), repeats, budget)
    shape = ModelShape(layers, batch, dtype, training, compile_mode, checkpointing)
    console, facts = Console(stderr=True), environment(timer.device)
    rows: list[Row] = []
    said: dict[str, dict[str, Any]] = {}
    result = {"benchmark": "models", "environment": facts, **asdict(shape), "errors": said, "rows": rows}
    for name in models:
        with console.status(f"{name}: comparing"):
            errors = _compare(CASES[name], shape, timer.device)
        said[name] = errors.as_json()
        refused = [
            {"name": _stock_name(name, other, mode), **found}
            for other, found in errors.others.items()
            for mode in {None, compile_mode}
            if found.get("failed")
        ]
        for n in sorted(lengths):
            with console.status(f"{name}: n = {n:,}"):
                for row in _one_length(name, n, shape, errors, timer, refused + rows):
                    print_row(row, _figures_text, console)
                    rows.append(row)
            _add_ratios(rows)
            result["slopes"] = slopes(rows, ("forward_s", "step_s", "peak_bytes"))
            if out:
                # what is measured stays, whatever happens to the next model
                write_json(result, result_path(out, facts, "models"))
    _table(result).print(Console())
    if plot:
        plot_result(result, f"{layers} layers, hidden size 768 or 1,024, {batch} row(s), {dtype}", plot)
    return result


def _build(
    case: Case, n: int, layers: int, dtype: torch.dtype, device: torch.device, implementation: str | None = None
) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = case.model_class
    with device:
        config = model_class.config_class(**case.config(n, layers), attn_implementation=implementation)
        model = model_class(config)
    return model.to(device, dtype).train()


def _inputs(case: Case, n: int, batch: int, device: torch.device) -> dict[str, Tensor]:
    if case.reads is not None:
        name, shape = case.reads(n)
        return {name: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(n)).to(device)}
    ids = torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(n)).to(device)
    if not case.global_tokens:
        return {"input_ids": ids}
    marks = torch.zeros_like(ids)
    marks[:, : case.global_tokens] = 1
    return {"input_ids": ids, "global_attention_mask": marks}


def _compare(case: Case, shape: ModelShape, device: torch.device) -> Errors:
    """Errors of output and gradient, of which ours must be right.

    Another implementation that is not has "failed".
    """
    n = case.compared
    stock = _build(case, n, shape.layers, torch.float32, device, case.implementations[0])
    given, mask = _inputs(case, n, 1, device), case.mask(n, device)
    masked = given if mask is None or not case.takes_mask else {**given, "attention_mask": mask}
    with nullcontext() if mask is None or case.takes_mask else attending_by(mask):
        right = _results(stock, stock, masked)
        stock = stock.to(DTYPES[shape.dtype])  # pyright: ignore[reportArgumentType]  # Transformers wraps Module.to
        theirs = _errors(_results(stock, stock, masked), right)
    sparse = sparsify(stock, case.pattern_of(n), **case.same(stock.config, n))
    ours = _errors(_results(sparse, sparse, given), right)
    wrong = _what_is_wrong(ours, theirs, shape.dtype)
    if wrong:
        raise AssertionError(f"{case.model}: {wrong}")

    def check(other: str) -> dict[str, Any]:
        if shape.training and (other, device.type) in NO_BACKWARD:
            return {"failed": NO_BACKWARD[other, device.type]}
        model = _build(case, n, shape.layers, DTYPES[shape.dtype], device, other)
        errors = _errors(_results(model, model, masked, gradient=shape.training), right)
        wrong = _what_is_wrong(errors, theirs, shape.dtype, case.peer_factor)
        return {"failed": f"wrong: {wrong}"} if wrong else dict(zip(("output", "gradient"), errors, strict=False))

    others = {}
    for other in filter(None, case.implementations[1:]):
        others[other] = measured({}, partial(check, other), REFUSALS)
        forget_compiled(device)
    return Errors(theirs, ours, others)


def _what_is_wrong(
    errors: Sequence[float], theirs: Sequence[float], dtype: str, factor: float = ERROR_FACTOR
) -> str | None:
    for what, error, their in zip(("output", "gradient"), errors, theirs, strict=False):
        if not error <= max(factor * their, EXACT_ERROR):
            return f"{what} is off by {error:.1e}, Transformers' default in {dtype} by {their:.1e}"
    return None


def _results(
    model: PreTrainedModel, run: Callable[..., Any], inputs: Mapping[str, Tensor], gradient: bool = True
) -> tuple[Tensor, ...]:
    """Output of `run`, and the gradient of the model's embeddings, or of the convolution that is its first.

    `run` is the model, or the model compiled.
    """
    inputs = _in_dtype_of(model, inputs)
    if not gradient:
        with torch.no_grad():
            return (_output(run, inputs).float(),)
    weights = next(p for p in model.parameters() if p.shape[:1] == (VOCABULARY,) or (p.ndim > 2 and len(p) > 1))
    out = _output(run, inputs)
    # what is behind a layer norm has almost no gradient of its mean or square
    (grad,) = torch.autograd.grad(out, weights, _direction(out))
    return out.detach().float(), grad.float()


def _in_dtype_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def _output(run: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    # hashes are drawn from torch's generator
    torch.manual_seed(0)
    return run(**inputs)[0]


def _direction(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)


def _errors(got: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[float, ...]:
    return tuple(float((a - b).norm() / b.norm()) for a, b in zip(got, right[: len(got)], strict=True))


def _stock_name(name: str, implementation: str | None, mode: str | None = None) -> str:
    return f"{name}, transformers" + (f" ({implementation})" if implementation else "") + _compiled(mode)


def _compiled(mode: str | None) -> str:
    return ", compiled" if mode else ""


def _one_length(
    name: str, n: int, shape: ModelShape, errors: Errors, timer: Timer, earlier: Sequence[Row]
) -> Iterator[Row]:
    """A row for each implementation of Transformers, compiled or not, and one of ours."""
    case, mode = CASES[name], shape.compile_mode
    stock = "dense" if case.dense else "transformers"
    modes = (None, mode) if mode else (None,)
    variants = [(stock, implementation, of) for implementation in case.implementations for of in modes]
    for kind, implementation, of in (*variants, ("ours", None, mode)):
        label = f"{name}, sparse_hf" + _compiled(of) if kind == "ours" else _stock_name(name, implementation, of)
        row: Row = {"model": name, "name": label, "kind": kind, "n": n}
        row |= {"implementation": implementation} if implementation else {}
        row |= {"compile_mode": of} if mode else {}
        reason = why_not_run(row, earlier, ("forward_s", "step_s"), timer.budget_s)
        if reason:
            yield {**row, "failed": reason}
        else:
            may_refuse = implementation in case.implementations[1:] or (of and kind != "ours")
            work = partial(_figures, case, row, shape, errors, timer)
            yield measured(row, work, REFUSALS if may_refuse else ())
        forget_compiled(timer.device)


def _figures_text(row: Row) -> str:
    step = "" if row["step_s"] is None else f", step {duration(row['step_s'])}"
    memory = "" if row["peak_bytes"] is None else f", {size(row['peak_bytes'])}"
    return f"forward {duration(row['forward_s'])}{step}{memory}"


def _figures(case: Case, row: Row, shape: ModelShape, errors: Errors, timer: Timer) -> Row:
    n, mode, device = row["n"], row.get("compile_mode"), timer.device
    model = _build(case, n, shape.layers, DTYPES[shape.dtype], device, row.get("implementation"))
    if row["kind"] == "ours":
        model = sparsify(model, case.pattern_of(n))
    inputs = _in_dtype_of(model, _inputs(case, n, shape.batch, device))
    before, found = held_bytes(device), {}
    if shape.checkpointing:
        # Transformers' Reformer, whose layers are reversible, has none
        found["checkpointing"] = model.supports_gradient_checkpointing
        if found["checkpointing"]:
            # the newer name came with Transformers 5.24
            newer: Any = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    run: Callable[..., Any] = model
    if mode:
        run = torch.compile(model, mode=mode)
        found["against_uncompiled"] = _checked_compiled(model, run, inputs, shape)
        wrong = _what_is_wrong(found["against_uncompiled"], errors.stock, shape.dtype)
        if wrong:
            raise AssertionError(f"{row['name']}, n = {n}, in mode {mode}: {wrong}")

    @torch.no_grad()
    def forward():
        model.eval()
        return run(**inputs)[0]

    grad = _direction(forward())

    def step():
        model.train()
        model.zero_grad(set_to_none=True)
        run(**inputs)[0].backward(grad)

    found |= {"forward_s": timer.seconds(forward), "forward_peak_bytes": peak_bytes(forward, device)}
    if shape.training:
        found |= {"step_s": timer.seconds(step)}
        model.zero_grad(set_to_none=True)
        found |= {"peak_bytes": peak_bytes(step, device), "tokens_per_s": shape.batch * n / found["step_s"]}
        # what weights take: 6 operations per weight and token (arXiv:2203.15556, appendix F),
        # attention apart
        weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        found |= {"weights": weights, "weight_tflops": 6e-12 * weights * found["tokens_per_s"]}
    else:
        found |= {"step_s": None, "peak_bytes": found["forward_peak_bytes"]}
    if mode and device.type == "cuda":
        found["graphs_bytes"] = held_bytes(device) - before - grad.nbytes
        found["peak_bytes"] += found["graphs_bytes"]
    return found


def _checked_compiled(
    model: PreTrainedModel, run: Callable[..., Any], inputs: Mapping[str, Tensor], shape: ModelShape
) -> tuple[float, ...]:
    """Errors of the model compiled against itself uncompiled."""
    right = _results(model, model, inputs, gradient=shape.training)
    again: tuple[Tensor, ...] = ()
    # a CUDA graph is warmed up by a first call and recorded by a second; what is timed is what
    # replays it
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        again = tuple(t.clone() for t in _results(model, run, inputs, gradient=shape.training))
    return _errors(again, right)


def _add_ratios(rows: Sequence[Row]) -> None:
    """Add ratios to Transformers' default attention, and to each timed by name."""
    for row in (r for r in rows if r["kind"] == "ours" and not r.get("failed")):
        others = [r for r in rows if r["model"] == row["model"] and r["n"] == row["n"] and r["kind"] != "ours"]
        names = dict.fromkeys(r.get("implementation") for r in others)
        # each at its fastest, which may be compiled or not
        timed = {
            name: min(found, key=_time_s)
            for name in names
            if (found := [r for r in others if r.get("implementation") == name and not r.get("failed")])
        }
        row |= _ratio(row, timed.get(next(iter(names)), {}))
        if named := {name: other for name, other in timed.items() if name}:
            row["beside"] = {name: _ratio(row, other) for name, other in named.items()}
            row["fastest"] = min(named, key=lambda name: _time_s(named[name]))


def _time_s(row: Row) -> float:
    return row["step_s"] or row["forward_s"]


def _ratio(row: Row, other: Row) -> dict[str, float | None]:
    """How many times faster a row is than the other, and its share of the memory."""

    def quotient(key: str, a: Row, b: Row) -> float | None:
        return a[key] / b[key] if a.get(key) and b.get(key) else None

    faster = {f"{what}_times_faster": quotient(f"{what}_s", other, row) for what in ("forward", "step")}
    return {**faster, "memory_ratio": quotient("peak_bytes", row, other)}


def _table(result: Result) -> Figures:
    what = f"{result['layers']} layers, {result['batch']} row(s), {result['dtype']}" + (
        f", compiled ({result['compile_mode']})" if result["compile_mode"] else ""
    )
    columns = ("", "forward", "training step", "peak", "faster", "forward", "memory")
    table = Figures(f"{what}, {result['environment']['hardware']}", columns)
    for row in result["rows"]:
        group, name = f"{row['model']}, {row['n']:,} tokens", row["name"].removeprefix(f"{row['model']}, ")
        if row.get("failed"):
            table.fail(group, name, row["failed"])
            continue
        beside = row.get("beside", {})
        figures = (duration(row["forward_s"]), duration(row["step_s"]), size(row["peak_bytes"]))
        table.add(group, name, *figures, *([] if beside else _ratio_texts(row)))
        for other, ratios in beside.items():
            mark = " *" if other == row["fastest"] and len(beside) > 1 else ""
            table.add(group, f"  by {other}{mark}", "", "", "", *_ratio_texts(ratios))
    table.notes.append("faster: a step (or forward pass) than of Transformers' class; memory: ours by theirs")
    if any(len(row.get("beside", {})) > 1 for row in result["rows"]):
        table.notes.append("*: the fastest of Transformers' implementations")
    table.notes += exponents(result, "step_s", "forward_s")
    return table


def _ratio_texts(ratios: Row) -> list[str]:
    return [times(ratios.get(key)) for key in ("step_times_faster", "forward_times_faster", "memory_ratio")]
