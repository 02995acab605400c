"""`sparse-hf bench chosen`: one layer that chooses its keys by an indexer, beside Transformers' class of the same weights.

Scoring is told apart from attending: both are also timed alone, on random tensors of the layer's shape. Where it is installed,
attn-gym's `lightning_indexer` scores the same ones. Its `gather_attn` has a schedule for heads that share keys on Blackwell alone;
elsewhere each head gathers for itself, which takes minutes at this shape.

Legend: n tokens, H heads, I heads of the indexer, D head dim without position, L numbers of a latent, N chosen keys of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..attention.chosen import IndexerScores, Latents, Limits, attend_latent, choose
from ..models import sparsify
from ..units import duration, size
from .measure import DTYPES, Timer, check_dtype, chosen_device, measured, peak_bytes, print_row, why_not_run
from .results import Result, Row, environment, result_path, slopes, write_json
from .text import Figures, exponents

# the longest text whose training step is timed
MAX_TRAINED_TOKENS = 8192
# queries whose choice and output are compared with float64, and the largest relative error of an output that is right
COMPARED, TOLERANCE = 32, {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
# a choice by rounded scores may differ from the exact one at its edge
LEAST_ALIKE = 0.99
# rows that are no whole layer
PARTS = ("ours: scores and choice", "ours: attention")
ATTN_GYM = "attn-gym: scores and choice"


@dataclass(frozen=True)
class IndexedShape:
    """Widths of a layer with latents and an indexer."""

    hidden_size: int = 7168
    heads: int = 128
    head_dim: int = 128
    turned_dim: int = 64
    value_dim: int = 128
    latent_dim: int = 512
    query_dim: int = 1536
    index_heads: int = 64
    index_dim: int = 128
    count: int = 2048

    def config(self, longest: int) -> dict[str, Any]:
        """Arguments of `DeepseekV32Config` for one layer with next to nothing beside its attention."""
        return {
            "vocab_size": 256, "hidden_size": self.hidden_size, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "kv_lora_rank": self.latent_dim,
            "q_lora_rank": self.query_dim, "qk_rope_head_dim": self.turned_dim, "qk_nope_head_dim": self.head_dim,
            "v_head_dim": self.value_dim, "index_topk": self.count, "index_head_dim": self.index_dim,
            "index_n_heads": self.index_heads, "mlp_layer_types": ["dense"], "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 1, "moe_intermediate_size": 16, "max_position_embeddings": longest, "pad_token_id": None,
        }  # fmt: skip


# the published widths of DeepSeek V3.2, and ones that a CPU computes
SHAPES = {
    "deepseek_v32": IndexedShape(),
    "tiny": IndexedShape(64, 4, 16, 8, 12, 32, 24, 4, 16, 64),
}


def run_chosen(
    lengths: Sequence[int] = (2048, 8192, 32768, 131072),
    shape: str = "deepseek_v32",
    *,
    dtype: str = "bf16",
    device: str | None = None,
    training: bool = True,
    repeats: int = 3,
    budget: float = 20.0,
    out: str | Path | None = None,
) -> Result:
    """Time one layer over `lengths`, print a table, and write the figures.

    Ours and Transformers' class on each of its attention implementations have the same weights. The scores and the attention of
    ours are timed alone as well, and some of their rows compared with float64 before.

    Args:
        lengths: sequence lengths n.
        shape: a name of `SHAPES`.
        dtype: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda"; by default the GPU if there is one.
        training: time a training step too, up to `MAX_TRAINED_TOKENS` tokens.
        repeats: timed calls per figure, of which the median counts.
        budget: seconds per figure; what took longer is not run on longer texts.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-chosen.json`.

    Raises:
        ValueError: an unknown shape, dtype or device.
        AssertionError: a choice or an output that is wrong.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; the known ones are {', '.join(SHAPES)}")
    check_dtype(dtype)
    timer, of_layer = Timer(chosen_device(device), repeats, budget), SHAPES[shape]
    facts, rows, console = environment(timer.device), [], Console(stderr=True)
    result: Result = {
        "benchmark": "chosen",
        "environment": facts,
        "shape": shape,
        **asdict(of_layer),
        "dtype": dtype,
        "rows": rows,
    }
    cases = {**_layers(of_layer, dtype, timer, max(lengths)), **_parts(of_layer, dtype, timer)}
    for n in sorted(lengths):
        for name, run in cases.items():
            trains = training and n <= MAX_TRAINED_TOKENS
            row: Row = {
                "name": name,
                "kind": "part" if name in (*PARTS, ATTN_GYM) else "layer",
                "n": n,
                "step_s": None,
            }
            reason = why_not_run(row, rows, ("forward_s", "step_s"), budget)
            with console.status(f"{name}, n = {n:,}"):
                rows.append({**row, "failed": reason} if reason else measured(row, partial(run, n, trains)))
            print_row(rows[-1], lambda row: f"{duration(row['forward_s'])}, {size(row['peak_bytes'] or 0)}", console)
            if timer.device.type == "cuda":
                torch.cuda.empty_cache()
            _add_ratios(rows, n)
            if out:
                # what is measured stays, whatever happens next
                write_json(result, result_path(out, facts, "chosen"))
    result["slopes"] = slopes(rows, ("forward_s", "peak_bytes"))
    if out:
        write_json(result, result_path(out, facts, "chosen"))
    _table(result).print(Console())
    return result


Case = Callable[[int, bool], Row]


def _layers(shape: IndexedShape, dtype: str, timer: Timer, longest: int) -> dict[str, Case]:
    """Transformers' class on each implementation, and ours."""
    from transformers import DeepseekV32Config, DeepseekV32Model

    torch.manual_seed(0)
    with torch.device(timer.device):
        # its own types of `to` say nothing of dtypes
        dense: Any = DeepseekV32Model(DeepseekV32Config(**shape.config(longest)))
    dense = dense.to(DTYPES[dtype]).eval()
    sparse: Any = sparsify(dense)
    sparse = sparse.to(timer.device).eval()

    def run(model: Any, implementation: str | None, n: int, trains: bool) -> Row:
        if implementation:
            model.set_attn_implementation(implementation)
        ids = torch.randint(3, 256, (1, n), generator=torch.Generator().manual_seed(n)).to(timer.device)

        def forward() -> Tensor:
            return model(input_ids=ids, use_cache=False)[0]

        with torch.no_grad():
            peak = peak_bytes(forward, timer.device)
            row: Row = {"forward_s": timer.seconds(forward), "peak_bytes": peak}
        if trains:
            row |= _step(forward, model, timer)
        return row

    rows = {f"transformers, {name}": partial(run, dense, name) for name in ("eager", "sdpa")}
    return {**rows, "ours": partial(run, sparse, None)}


def _step(forward: Callable[[], Tensor], model: Any, timer: Timer) -> Row:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().square().mean().backward()

    try:
        peak = peak_bytes(step, timer.device)
        return {"step_s": timer.seconds(step), "step_peak_bytes": peak}
    except torch.OutOfMemoryError:
        # the forward pass had its figures
        return {"step_s": None}
    finally:
        model.zero_grad(set_to_none=True)


def _parts(shape: IndexedShape, dtype: str, timer: Timer) -> dict[str, Case]:
    """The scores with the choice, and attention to what is chosen, of ours alone, and the former of attn-gym."""

    def choosing(pick: Callable[[IndexerScores], Tensor], n: int, trains: bool) -> Row:
        scorer = drawn_scores(shape, n, DTYPES[dtype], timer.device)

        def work() -> Tensor:
            return pick(scorer)

        alike = same_choice(scorer, work())
        if alike < LEAST_ALIKE:
            raise AssertionError(
                f"of the chosen keys at n={n} {alike:.4f} are those of float64; {LEAST_ALIKE} is right"
            )
        peak = peak_bytes(work, timer.device)
        return {"forward_s": timer.seconds(work), "peak_bytes": peak, "chosen_alike": alike}

    @torch.no_grad()
    def attending(n: int, trains: bool) -> Row:
        query, latents = drawn_latents(shape, n, DTYPES[dtype], timer.device)
        chosen = choose(drawn_scores(shape, n, DTYPES[dtype], timer.device), shape.count, Limits(q_offset=0))
        scale = (shape.head_dim + shape.turned_dim) ** -0.5

        def work() -> Tensor:
            return attend_latent(query, latents, chosen, scale=scale)

        out = work()
        error = latent_error(query, latents, chosen, scale, out)
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"attention at n={n} is off by {error:.1e}; {TOLERANCE[dtype]:.0e} is right")
        held = out.numel() * out.element_size()
        del out
        peak = peak_bytes(work, timer.device)
        return {
            "forward_s": timer.seconds(work),
            "peak_bytes": peak,
            "extra_bytes": None if peak is None else max(0, peak - held),
            "relative_error": error,
        }

    def ours(scorer: IndexerScores) -> Tensor:
        return choose(scorer, shape.count, Limits(q_offset=0))

    found: dict[str, Case] = {PARTS[0]: partial(choosing, ours), PARTS[1]: attending}
    if timer.device.type == "cuda" and util.find_spec("attn_gym"):
        found[ATTN_GYM] = partial(choosing, partial(chosen_by_attn_gym, count=shape.count))
    return found


def chosen_by_attn_gym(scorer: IndexerScores, count: int) -> Tensor:
    """The choice of attn-gym 0.0.17, `[1, 1, n, N]`, whose weights are in the dtype of queries."""
    from attn_gym.sparse.indexer import lightning_indexer  # pyright: ignore[reportMissingImports]  # a peer

    weights = scorer.weights.to(scorer.query.dtype)
    return lightning_indexer(scorer.query, scorer.key, weights, count, causal=True)[:, None]


def drawn_scores(shape: IndexedShape, n: int, dtype: torch.dtype, device: torch.device) -> IndexerScores:
    """Random queries, keys and weights of an indexer."""
    query, key, weights = _drawn(
        n, dtype, device, (n, shape.index_heads, shape.index_dim), (n, shape.index_dim), (n, shape.index_heads)
    )
    # numbers of `dtype`, so that those who take weights in it see the same
    return IndexerScores(query, key, weights.float(), shape.index_dim**-0.5)


def drawn_latents(shape: IndexedShape, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Latents]:
    """Random queries `[1, H, n, D + P]`, in memory with tokens before heads, and latents."""
    query, latent, turned = _drawn(
        n,
        dtype,
        device,
        (n, shape.heads, shape.head_dim + shape.turned_dim),
        (n, shape.latent_dim),
        (n, shape.turned_dim),
    )
    up_key, up_value = (
        t[0] * shape.latent_dim**-0.5
        for t in _drawn(
            0,
            dtype,
            device,
            (shape.heads, shape.head_dim, shape.latent_dim),
            (shape.heads, shape.value_dim, shape.latent_dim),
        )
    )
    return query.transpose(1, 2), Latents(latent, turned, up_key, up_value)


def _drawn(seed: int, dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> Iterator[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn((1, *shape), generator=generator, device=device, dtype=dtype) for shape in shapes)


def same_choice(scorer: IndexerScores, chosen: Tensor) -> float:
    """The share of the keys of some queries that are among the best by float64."""
    n, found, wanted = scorer.shape[2], 0, 0
    for query in torch.randperm(n, generator=torch.Generator().manual_seed(0))[:COMPARED].tolist():
        one = IndexerScores(
            scorer.query[:, query : query + 1].double(),
            scorer.key.double(),
            scorer.weights[:, query : query + 1].double(),
            scorer.scale,
        )
        scores = one.scores(slice(0, 1), slice(0, query + 1))[0, 0, 0]
        best = scores.topk(min(chosen.shape[3], query + 1)).indices
        own = chosen[0, 0, query]
        found += int(torch.isin(own[own >= 0].long(), best).sum())
        wanted += len(best)
    return found / wanted


def latent_error(query: Tensor, latents: Latents, chosen: Tensor, scale: float, out: Tensor) -> float:
    """The largest relative error of some rows of an output, against float64."""
    worst = 0.0
    for at in torch.randperm(query.shape[2], generator=torch.Generator().manual_seed(0))[:COMPARED].tolist():
        index = chosen[0, 0, at]
        index = index[index >= 0].long()
        latent, turned = (t[:, index].double() for t in (latents.latent, latents.turned))
        some = Latents(latent, turned, latents.up_key.double(), latents.up_value.double())
        key, value = some.keys_and_values()
        weights = (query[:, :, at : at + 1].double() @ key.mT * scale).softmax(-1)
        exact = weights @ value
        worst = max(worst, float((out[:, :, at : at + 1].double() - exact).norm() / exact.norm()))
    return worst


def _add_ratios(rows: Sequence[Row], n: int) -> None:
    """Add how many times as long the fastest implementation of Transformers takes."""
    beside = [row for row in rows if row["n"] == n and not row.get("failed")]
    for row in (row for row in beside if row["name"] == "ours"):
        for key in ("forward_s", "step_s"):
            theirs = min(
                (other[key] for other in beside if other["name"].startswith("transformers") and other.get(key)),
                default=None,
            )
            row[f"{key[:-2]}_transformers_over_ours"] = theirs / row[key] if theirs and row.get(key) else None


def _table(result: Result) -> Figures:
    title = f"one layer, {result['shape']}, {result['dtype']}, {result['environment']['hardware']}"
    table = Figures(title, ("", "forward", "+ backward", "memory", "of Transformers"))
    for row in result["rows"]:
        if row.get("failed"):
            table.fail(f"{row['n']:,} tokens", row["name"], row["failed"])
            continue
        ratio = row.get("forward_transformers_over_ours")
        peak, step = row["peak_bytes"], row.get("step_s")
        cells = duration(row["forward_s"]), duration(step) if step else "", size(peak) if peak is not None else ""
        table.add(f"{row['n']:,} tokens", row["name"], *cells, f"{ratio:.1f} x" if ratio else "")
    table.notes.append("memory: the most that a forward pass holds beyond what was there before, its output included")
    table.notes += exponents(result, "forward_s")
    return table
