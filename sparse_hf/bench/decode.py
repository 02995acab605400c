"""`sparse-hf bench decode`: one token at a time with a cache, sparse beside dense with the same weights, context by context."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from ..models import FAMILIES, StreamingCache, sparsify
from ..models.hf.model_mixin import CACHE_NAMES
from ..pattern import Pattern
from ..pattern.base import Marks
from ..plan import build_plan
from .cases import VOCABULARY
from .measure import DTYPES, environment, measured, peak_bytes, seconds_in_turn, slopes, synchronize, tell, write_json
from .models import EXACT, FACTOR
from .plot import plot_result

HEAD_DIM = 64
# tokens on which both are compared before anything is timed: the first of these at which the pattern lacks a pair
CHECKED = (1280, 2560, 5120)
# tokens whose answers are compared, each a step behind a filled cache
STEPS = 4
CACHES: dict[str, Callable[[LlamaConfig, int], Cache]] = {
    "dynamic": lambda config, most: DynamicCache(config=config),
    "static": lambda config, most: StaticCache(config=config, max_cache_len=most),
    "streaming": lambda config, most: StreamingCache(config),
}
# what a dense model runs with instead, which looks back at every key
DENSE_CACHES = {"streaming": "static"}


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
) -> dict:
    """Time single tokens behind contexts of `lengths`, print a table, and write the figures to `out` (JSON) and `plot` (PNG).

    A Llama with random weights and heads of 64 runs dense, with SDPA, and sparse, with the same weights. A pass over the context
    fills the cache; then each token is a step of its own, of which the median counts, by the clock: the host waits for every
    token, as `generate` does. All contexts of both have their next token in turn, so that whatever else the host does slows
    all of them alike; their caches are there at the same time.

    Transformers' caches keep all keys, also those that the pattern lets nobody see again, so that sparse decoding reads less but
    holds as much as dense decoding. A dynamic one, the default, moreover copies all it holds with every token, which grows with
    the context whatever the pattern; a static one has its memory from the start. A streaming cache is ours and keeps only what is
    seen again; beside it the dense model, which sees all, runs with a static one. Each row says which cache it had.

    Correctness comes first. Answers of the sparse model's last tokens, one by one behind a cache, are compared with the
    dense model that is given the pattern as its mask, in float32: they may be no farther from it than twice as far as the dense
    model is in `dtype`. At every length timed they are also compared with the sparse model's own without a cache, unless `chunk` says
    that a context in one piece is too large.

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
        out, plot: where to write the result, and to draw it (needs matplotlib).

    Raises:
        ValueError: an unknown dtype or cache, sizes that do not fit together, a bad pattern.
        AssertionError: the sparse model answers otherwise than the pattern says.
    """
    build_plan(pattern, 1)
    _refuse(lengths, hidden_size, kv_heads, tokens, chunk, cache, dtype)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = {
        "layers": layers, "hidden_size": hidden_size, "kv_heads": kv_heads or hidden_size // HEAD_DIM, "batch": batch,
        "tokens": tokens, "chunk": chunk, "cache": cache, "dtype": dtype,
    }  # fmt: skip
    console, rows, waiting = Console(stderr=True), [], []
    models = _models(shape, pattern, max(*lengths, CHECKED[-1]) + STEPS + tokens + 2, place)
    with console.status("comparing"):
        checked = _compare(models, pattern, shape, place)
    text = str(Pattern.parse(pattern))
    result = {"benchmark": "decode", "environment": environment(place), "pattern": text, **shape}
    result |= {"checked": checked, "rows": rows}
    for n in sorted(lengths):
        for name, model in models.items():
            kind, kept = ("ours", cache) if name == "sparse_hf" else ("dense", DENSE_CACHES.get(cache, cache))
            row = {"name": name, "kind": kind, "n": n, "cache": kept}
            with console.status(f"{name}: n = {n:,}"):
                work = partial(_filled, model, row, shape, checked["bound"], place)
                rows.append(measured(row, work, rows, ("fill_s",), budget))
            tell(rows[-1], lambda row: f"read in {row['fill_s']:,.2f} s", console)
            if not rows[-1].get("failed"):
                waiting.append((rows[-1], rows[-1].pop("held"), rows[-1].pop("step")))
            if out:
                # what is measured stays, whatever happens to the next row
                write_json(result, out)
    with console.status("one token after the other"):
        times = seconds_in_turn([step for *_, step in waiting], tokens, budget * len(waiting))
    for (row, held, _), token_s in zip(waiting, times, strict=True):
        row |= {"token_s": token_s, "tokens_per_s": batch / token_s, "cache_bytes": _bytes(held)}
        if row["peak_bytes"] is not None:
            row["peak_bytes"] += row["cache_bytes"]
        tell(row, lambda row: f"{row['token_s'] * 1e3:,.2f} ms", console)
    _ratios(rows)
    result["slopes"] = slopes(rows, ("fill_s", "token_s", "peak_bytes"))
    result["longest_by_shortest"] = {
        name: max(found) / min(found)
        for name in models
        if (found := [row["token_s"] for row in rows if row["name"] == name and not row.get("failed")])
    }
    if out:
        write_json(result, out)
    Console(width=max(Console().width, 124)).print(_table(result))
    if plot:
        plot_result(result, f"{text}: {_sizes(result)}", plot, ("token_s", "one token"))
    return result


def _refuse(lengths, hidden_size: int, kv_heads: int | None, tokens: int, chunk: int | None, cache: str, dtype: str):
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; the known ones are {', '.join(DTYPES)}")
    if cache not in CACHES:
        raise ValueError(f"cache is {cache!r}; the known ones are {', '.join(CACHES)}")
    if hidden_size < HEAD_DIM or hidden_size % HEAD_DIM:
        raise ValueError(
            f"hidden_size is {hidden_size}; heads have {HEAD_DIM} numbers, so it must be a multiple of that"
        )
    heads = hidden_size // HEAD_DIM
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"kv_heads is {kv_heads}; it must divide the {heads} query heads")
    for name, value in (("lengths", min(lengths)), ("tokens", tokens), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _models(shape: dict, pattern: str, most: int, place: torch.device) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    hidden = shape["hidden_size"]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=shape["layers"],
        num_attention_heads=hidden // HEAD_DIM, num_key_value_heads=shape["kv_heads"], vocab_size=VOCABULARY,
        max_position_embeddings=most, attn_implementation="sdpa",
    )  # fmt: skip
    with place:
        dense = LlamaForCausalLM(config)
    dense = dense.to(place, DTYPES[shape["dtype"]]).eval()
    return {"dense, SDPA": dense, "sparse_hf": sparsify(dense, pattern)}


def _tokens(n: int, batch: int, place: torch.device) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(n)).to(place)


@lru_cache
def _cache_name(model_class: type) -> str:
    # Transformers 5.24 calls it otherwise than 5.17
    return next(name for name in CACHE_NAMES if name in inspect.signature(model_class.forward).parameters)


@torch.no_grad()
def _answers(model: nn.Module, ids: Tensor, cache: Cache | None = None, **given) -> Tensor:
    if cache is not None:
        given[_cache_name(type(model))] = cache
    return model(input_ids=ids, use_cache=cache is not None, **given).logits


def _fill(model: nn.Module, ids: Tensor, cache: Cache, chunk: int | None) -> None:
    for part in ids.split(chunk or ids.shape[1], dim=1):
        _answers(model, part, cache, logits_to_keep=1)


def _decode(model: nn.Module, ids: Tensor, cache: Cache) -> Tensor:
    """The answers to `ids`, one after the other behind what the cache holds."""
    return torch.cat([_answers(model, one, cache) for one in ids.split(1, dim=1)], 1)


def _compare(models: dict[str, nn.Module], pattern: str, shape: dict, place: torch.device) -> dict:
    """Relative errors against the dense model in float32 under the pattern's mask: its own in `dtype`, and ours."""
    dense, sparse = models.values()
    # what is last in a text is nothing in a decoder: the configuration knows what a pattern means there
    text = FAMILIES["llama"].config_class.from_dense(dense.config, pattern).layer_pattern(0, is_causal=True)
    for n in CHECKED:
        mask = _mask(text, n, place)
        # a pair that a causal model has and the pattern has not, of a query that is compared
        if not mask[..., -1, :].all():
            break
    ids = _tokens(n, 1, place)
    given = {"attention_mask": mask, "logits_to_keep": STEPS}
    theirs = _answers(dense, ids, **given).float()
    right = _answers(dense.float(), ids, **given)
    # weights are shared, so that both are in float32 now
    dense.to(DTYPES[shape["dtype"]])
    cache = CACHES[shape["cache"]](sparse.config, n)
    _fill(sparse, ids[:, :-STEPS], cache, shape["chunk"])
    mine, their = _error(_decode(sparse, ids[:, -STEPS:], cache), right), _error(theirs, right)
    bound = max(FACTOR * their, EXACT)
    if not mine <= bound:
        raise AssertionError(
            f"tokens behind a cache of {n - STEPS}: answers are off by {mine:.1e}; {bound:.1e} is right"
        )
    return {"tokens": n, "error": mine, "dense_error": their, "bound": bound}


def _mask(text: str, n: int, place: torch.device) -> Tensor:
    """`[1, H or 1, n, n]` bool."""
    pattern, at = Pattern.parse(text).on(place), torch.arange(n, device=place)
    each = [p.allows(at[:, None], at[None, :], Marks(length=n)).expand(n, n) for p in pattern.heads or (pattern,)]
    return torch.stack(each)[None]


def _error(got: Tensor, right: Tensor) -> float:
    return float((got.float() - right.float()).norm() / right.float().norm())


def _filled(model: nn.Module, row: dict, shape: dict, bound: float, place: torch.device) -> dict:
    """Figures of a cache that holds the context, "held", and "step", which gives its next token."""
    n, found = row["n"], {}
    ids = _tokens(n + STEPS + shape["tokens"] + 2, shape["batch"], place)
    context, first, rest = ids[:, :n], ids[:, n : n + STEPS], iter(ids[:, n + STEPS :].split(1, dim=1))
    cache = CACHES[row["cache"]](model.config, ids.shape[1])

    def fill():
        begin = time.perf_counter()
        _fill(model, context, cache, shape["chunk"])
        synchronize(place)
        found["fill_s"] = time.perf_counter() - begin

    def step():
        # the host asks for the token, and waits
        _answers(model, next(rest), cache)[:, -1].argmax(-1).tolist()

    found["fill_peak_bytes"] = peak_bytes(fill, place)
    answers = _decode(model, first, cache)
    found["error"] = None
    if row["kind"] == "ours" and not shape["chunk"]:
        whole = _answers(model, ids[:, : n + STEPS], logits_to_keep=STEPS)
        found["error"] = _error(answers, whole)
        if not found["error"] <= bound:
            raise AssertionError(
                f"tokens behind a cache of {n}: answers are off by {found['error']:.1e} from those without one; {bound:.1e} is right"
            )
        del whole
    return {**found, "peak_bytes": peak_bytes(step, place), "held": cache, "step": step}


def _bytes(cache: Cache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _ratios(rows: list[dict]) -> None:
    """How many times faster than the dense model."""
    for row in (r for r in rows if r["kind"] == "ours" and not r.get("failed")):
        other = next(r for r in rows if r["n"] == row["n"] and r["kind"] == "dense")
        row["times_faster"] = None if other.get("failed") else other["token_s"] / row["token_s"]


def _sizes(result: dict) -> str:
    other = DENSE_CACHES.get(result["cache"])
    return (
        f"Llama, {result['layers']} layers of {result['hidden_size']}, {result['kv_heads']} key heads, {result['batch']} row(s), "
        f"{result['dtype']}, {result['cache']} cache" + (f" (dense: {other})" if other else "")
    )


def _table(result: dict) -> Table:
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
