"""`sparse-hf bench decode`: one token at a time with a cache, sparse beside dense."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from ..models import FAMILIES, StreamingCache, sparsify
from ..models.hf.cache import CACHE_NAMES
from ..pattern import Pattern
from ..pattern.base import Marks
from ..plan import build_plan
from .cases import VOCABULARY
from .measure import (
    DTYPES,
    check_dtype,
    chosen_device,
    measured,
    peak_bytes,
    print_row,
    seconds_in_turn,
    synchronize,
    why_not_run,
)
from .models import ERROR_FACTOR, EXACT_ERROR
from .plot import plot_result
from .results import Result, Row, environment, result_path, slopes, write_json

HEAD_DIM = 64
# tokens on which both are compared before anything is timed: the first of these at which the
# pattern lacks a pair
COMPARED_LENGTHS = (1280, 2560, 5120)
# tokens whose answers are compared, each a step behind a filled cache
COMPARED_STEPS = 4
# tokens behind those that are compared which are not timed: one that measures memory, and one to
# spare
UNTIMED_STEPS = 2
CACHES: dict[str, Callable[[Any, int], Cache]] = {
    "dynamic": lambda config, most: DynamicCache(config=config),
    "static": lambda config, most: StaticCache(config=config, max_cache_len=most),
    "streaming": lambda config, most: StreamingCache(config),
}
# what a dense model, which looks back at every key, runs with instead
DENSE_CACHES = {"streaming": "static"}


@dataclass(frozen=True)
class DecodeShape:
    """The decoder that runs, its cache, and how many tokens it is asked for."""

    layers: int
    hidden_size: int
    kv_heads: int
    batch: int
    tokens: int
    chunk: int | None
    cache: str
    dtype: str

    def __post_init__(self):
        check_dtype(self.dtype)
        if self.cache not in CACHES:
            raise ValueError(f"cache is {self.cache!r}; the known ones are {', '.join(CACHES)}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; it must divide the {self.heads} query heads")
        for name, value in (("tokens", self.tokens), ("chunk", self.chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @property
    def heads(self) -> int:
        return self.hidden_size // HEAD_DIM

    def config(self, most_tokens: int) -> LlamaConfig:
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": 3 * self.hidden_size, "vocab_size": VOCABULARY}
        layers: dict[str, Any] = {"num_hidden_layers": self.layers, "attn_implementation": "sdpa"}
        return LlamaConfig(**heads, **sizes, **layers, max_position_embeddings=most_tokens)


@dataclass(frozen=True)
class Filled:
    """A cache that holds a context, and `step`, which gives the context's next token."""

    row: Row
    cache: Cache
    step: Callable[[], object]


def run_decode(
    lengths: Sequence[int] = (1024, 4096, 16384),
    pattern: str = "streaming(window=1024, sinks=4)",
    *,
    layers: int = 4,
    hidden_size: int = 512,
    kv_heads: int | None = None,
    batch: int = 1,
    tokens: int = 32,
    chunk: int | None = None,
    cache: str = "dynamic",
    dtype: str = "fp32",
    device: str | None = None,
    budget: float = 60.0,
    out: str | Path | None = None,
    plot: str | Path | None = None,
) -> Result:
    """Time tokens behind contexts of `lengths`, print a table, and write the figures.

    A Llama with random weights and heads of 64 runs dense, with SDPA, and sparse, with the same
    weights. A pass over the context fills the cache; then each token is a step of its own, of which
    the median counts, by the clock: the host waits for every token, as `generate` does. All
    contexts of both have their next token in turn, so that whatever else the host does slows all of
    them alike; their caches are there at the same time.

    Transformers' caches keep all keys, also those that the pattern lets nobody see again, so that
    sparse decoding reads less but holds as much as dense decoding. A dynamic one, the default,
    moreover copies all it holds with every token, which grows with the context whatever the
    pattern; a static one has its memory from the start. A streaming cache is ours and keeps only
    what is seen again; beside it the dense model, which sees all, runs with a static one. Each row
    says which cache it had.

    Correctness comes first. Answers of the sparse model's last tokens, one by one behind a cache,
    are compared with the dense model that is given the pattern as its mask, in float32: they may be
    no farther from it than twice as far as the dense model is in `dtype`. At every length timed
    they are also compared with the sparse model's own without a cache, unless `chunk` says that a
    context in one piece is too large.

    Args:
        lengths: tokens of the context.
        pattern: text of the pattern, of every layer.
        layers, hidden_size: of the model; the inner size of its MLP is 3 times `hidden_size`.
        kv_heads: key heads; by default as many as query heads.
        batch: rows of a batch.
        tokens: timed tokens.
        chunk: fill the cache by so many tokens at a time; by default all at once.
        cache: "dynamic" or "static", Transformers' classes, or "streaming", our `StreamingCache`.
        dtype: "fp32", "bf16" or "fp16", of weights, activations and the cache.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        budget: seconds; a model that needed more to read a context is not run on longer ones.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-decode.json`.
        plot: where to draw it (PNG); needs matplotlib.

    Raises:
        ValueError: an unknown dtype, device or cache, sizes that do not fit together, a bad
            pattern.
        AssertionError: the sparse model answers otherwise than the pattern says.
    """
    build_plan(pattern, 1)
    if hidden_size < HEAD_DIM or hidden_size % HEAD_DIM:
        raise ValueError(
            f"hidden_size is {hidden_size}; heads have {HEAD_DIM} numbers, so it must be a multiple of that"
        )
    if min(lengths) < 1:
        raise ValueError(f"lengths is {min(lengths)}; it must be at least 1")
    kv_heads = hidden_size // HEAD_DIM if kv_heads is None else kv_heads
    shape = DecodeShape(layers, hidden_size, kv_heads, batch, tokens, chunk, cache, dtype)
    target, console, text = chosen_device(device), Console(stderr=True), str(Pattern.parse(pattern))
    models = _models(shape, pattern, max(*lengths, COMPARED_LENGTHS[-1]) + _steps(shape), target)
    with console.status("comparing"):
        checked = _compare(models, pattern, shape, target)
    rows: list[Row] = []
    facts = environment(target)
    result = {"benchmark": "decode", "environment": facts, "pattern": text, **asdict(shape)}
    result |= {"checked": checked, "rows": rows}

    def save():
        if out:
            write_json(result, result_path(out, facts, "decode"))

    filled: list[Filled] = []
    for model, row in _rows(models, lengths, cache):
        reason = why_not_run(row, rows, ("fill_s",), budget)
        with console.status(f"{row['name']}: n = {row['n']:,}"):
            work = partial(_filled, model, row, shape, checked["bound"], target)
            rows.append({**row, "failed": reason} if reason else measured(row, work))
        if not rows[-1].get("failed"):
            filled.append(Filled(rows[-1], rows[-1].pop("held"), rows[-1].pop("step")))
        print_row(rows[-1], lambda row: f"read in {row['fill_s']:,.2f} s", console)
        # what is measured stays, whatever happens to the next row
        save()
    with console.status("one token after the other"):
        times = seconds_in_turn([each.step for each in filled], tokens, budget * len(filled))
    for each, token_s in zip(filled, times, strict=True):
        row = each.row
        row |= {"token_s": token_s, "tokens_per_s": batch / token_s, "cache_bytes": _bytes(each.cache)}
        if row["peak_bytes"] is not None:
            row["peak_bytes"] += row["cache_bytes"]
        print_row(row, lambda row: f"{row['token_s'] * 1e3:,.2f} ms", console)
    _add_ratios(rows)
    result["slopes"] = slopes(rows, ("fill_s", "token_s", "peak_bytes"))
    result["longest_by_shortest"] = {
        name: max(found) / min(found)
        for name in models
        if (found := [row["token_s"] for row in rows if row["name"] == name and not row.get("failed")])
    }
    save()
    Console(width=max(Console().width, 124)).print(_table(result))
    if plot:
        plot_result(result, f"{text}: {_sizes(result)}", plot, ("token_s", "one token"))
    return result


def _steps(shape: DecodeShape) -> int:
    """Tokens that stand behind a context."""
    return COMPARED_STEPS + shape.tokens + UNTIMED_STEPS


def _models(shape: DecodeShape, pattern: str, most: int, device: torch.device) -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    with device:
        dense = LlamaForCausalLM(shape.config(most))
    dense.to(device, DTYPES[shape.dtype])  # pyright: ignore[reportArgumentType]  # Transformers wraps Module.to
    dense.eval()
    return {"dense, SDPA": dense, "sparse_hf": sparsify(dense, pattern)}


def _rows(
    models: dict[str, PreTrainedModel], lengths: Sequence[int], cache: str
) -> Iterator[tuple[PreTrainedModel, Row]]:
    for n in sorted(lengths):
        for name, model in models.items():
            kind, kept = ("ours", cache) if name == "sparse_hf" else ("dense", DENSE_CACHES.get(cache, cache))
            yield model, {"name": name, "kind": kind, "n": n, "cache": kept}


def _tokens(n: int, batch: int, device: torch.device) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(n)).to(device)


@lru_cache
def _cache_name(model_class: type) -> str:
    # Transformers 5.24 calls it otherwise than 5.17
    return next(name for name in CACHE_NAMES if name in inspect.signature(model_class.forward).parameters)


@torch.no_grad()
def _answers(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, **given) -> Tensor:
    if cache is not None:
        given[_cache_name(type(model))] = cache
    return model(input_ids=ids, use_cache=cache is not None, **given).logits


def _fill(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int | None) -> None:
    for piece in ids.split(chunk or ids.shape[1], dim=1):
        _answers(model, piece, cache, logits_to_keep=1)


def _decode(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """The answers to `ids`, one after the other behind what the cache holds."""
    return torch.cat([_answers(model, one, cache) for one in ids.split(1, dim=1)], 1)


def _compare(
    models: dict[str, PreTrainedModel], pattern: str, shape: DecodeShape, device: torch.device
) -> dict[str, Any]:
    """Relative errors of the dense model in `dtype`, and of ours.

    Both are against the dense model in float32 under the pattern's mask.
    """
    dense, sparse = models.values()
    # what is last in a text is nothing in a decoder: the configuration knows what a pattern means
    # there
    text = FAMILIES["llama"].config_class.from_dense(dense.config, pattern).layer_pattern(0, is_causal=True)
    n, mask = _shortest_that_lacks_a_pair(text, device)
    ids = _tokens(n, 1, device)
    given = {"attention_mask": mask, "logits_to_keep": COMPARED_STEPS}
    stock = _answers(dense, ids, **given).float()
    right = _answers(dense.float(), ids, **given)
    # weights are shared, so that both are in float32 now
    dense.to(DTYPES[shape.dtype])  # pyright: ignore[reportArgumentType]  # Transformers wraps Module.to
    cache = CACHES[shape.cache](sparse.config, n)
    _fill(sparse, ids[:, :-COMPARED_STEPS], cache, shape.chunk)
    error, dense_error = _error(_decode(sparse, ids[:, -COMPARED_STEPS:], cache), right), _error(stock, right)
    bound = max(ERROR_FACTOR * dense_error, EXACT_ERROR)
    if not error <= bound:
        raise AssertionError(
            f"tokens behind a cache of {n - COMPARED_STEPS}: answers are off by {error:.1e}; {bound:.1e} is right"
        )
    return {"tokens": n, "error": error, "dense_error": dense_error, "bound": bound}


def _shortest_that_lacks_a_pair(text: str, device: torch.device) -> tuple[int, Tensor]:
    """The first of `COMPARED_LENGTHS` at which the pattern lacks a pair, and its mask.

    A pair of a causal model, of a query that is compared.
    """
    n, mask = 0, torch.empty(0)
    for n in COMPARED_LENGTHS:
        mask = _mask(text, n, device)
        if not mask[..., -1, :].all():
            break
    return n, mask


def _mask(text: str, n: int, device: torch.device) -> Tensor:
    """`[1, H or 1, n, n]` bool."""
    pattern, at = Pattern.parse(text).on(device), torch.arange(n, device=device)
    each = [p.allows(at[:, None], at[None, :], Marks(length=n)).expand(n, n) for p in pattern.heads or (pattern,)]
    return torch.stack(each)[None]


def _error(got: Tensor, right: Tensor) -> float:
    return float((got.float() - right.float()).norm() / right.float().norm())


def _filled(model: PreTrainedModel, row: Row, shape: DecodeShape, bound: float, device: torch.device) -> Row:
    """Figures of a cache that holds the context.

    It is under "held", and "step" gives its next token.
    """
    n, found = row["n"], {}
    ids = _tokens(n + _steps(shape), shape.batch, device)
    compared = n + COMPARED_STEPS
    context, first, rest = ids[:, :n], ids[:, n:compared], iter(ids[:, compared:].split(1, dim=1))
    cache = CACHES[row["cache"]](model.config, ids.shape[1])

    def fill():
        begin = time.perf_counter()
        _fill(model, context, cache, shape.chunk)
        synchronize(device)
        found["fill_s"] = time.perf_counter() - begin

    def step():
        # the host asks for the token, and waits
        _answers(model, next(rest), cache)[:, -1].argmax(-1).tolist()

    found["fill_peak_bytes"] = peak_bytes(fill, device)
    answers = _decode(model, first, cache)
    found["error"] = None
    if row["kind"] == "ours" and not shape.chunk:
        whole = _answers(model, ids[:, :compared], logits_to_keep=COMPARED_STEPS)
        found["error"] = _error(answers, whole)
        if not found["error"] <= bound:
            raise AssertionError(
                f"tokens behind a cache of {n}: answers are off by {found['error']:.1e} from those without one; "
                f"{bound:.1e} is right"
            )
        del whole
    return {**found, "peak_bytes": peak_bytes(step, device), "held": cache, "step": step}


def _bytes(cache: Cache) -> int:
    layers: list[Any] = cache.layers
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def _add_ratios(rows: Sequence[Row]) -> None:
    """How many times faster than the dense model."""
    for row in (r for r in rows if r["kind"] == "ours" and not r.get("failed")):
        other = next(r for r in rows if r["n"] == row["n"] and r["kind"] == "dense")
        row["times_faster"] = None if other.get("failed") else other["token_s"] / row["token_s"]


def _sizes(result: Result) -> str:
    other = DENSE_CACHES.get(result["cache"])
    return (
        f"Llama, {result['layers']} layers of {result['hidden_size']}, {result['kv_heads']} key heads, {result['batch']} row(s), "
        f"{result['dtype']}, {result['cache']} cache" + (f" (dense: {other})" if other else "")
    )


def _table(result: Result) -> Table:
    table = Table(title=f"{result['pattern']}: {_sizes(result)}, {result['environment']['hardware']}")
    for column in ("context", "", "reading it", "one token", "tokens/s", "cache", "peak memory", "faster", "error"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        if row.get("failed"):
            table.add_row(f"{row['n']:,}", row["name"], row["failed"])
            continue
        times = (f"{row['fill_s']:,.2f} s", f"{row['token_s'] * 1e3:,.2f} ms", f"{row['tokens_per_s']:,.1f}")
        sizes = ("" if row[key] is None else f"{row[key] / 2**20:,.0f} MiB" for key in ("cache_bytes", "peak_bytes"))
        faster = f"{row['times_faster']:.2f} x" if row.get("times_faster") else ""
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        table.add_row(f"{row['n']:,}", row["name"], *times, *sizes, faster, error)
    fits = (f"{name} {fit['token_s']:.2f}" for name, fit in result["slopes"].items() if fit["token_s"])
    apart = (f"{name} {ratio:.2f}" for name, ratio in result["longest_by_shortest"].items())
    table.caption = (
        f"slope of a token's time against the context: {', '.join(fits)}; longest by shortest: {', '.join(apart)}"
    )
    return table
