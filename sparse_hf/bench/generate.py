"""`sparse-hf bench generate`: what a user of `generate` waits for, sparse beside dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import Cache, StoppingCriteriaList

from ..pattern import Pattern
from ..plan import build_plan
from ..units import duration, size, times
from .clock import SETTLING, Clock, OvertimeError, Stop, Times, read_times, time_limit
from .generate_cases import CASES, Case, Models, load_models
from .generate_exact import COMPARED_STEPS, compare, make_prompt
from .measure import (
    check_dtype,
    chosen_device,
    forget_compiled,
    measured,
    peak_bytes,
    print_row,
    used_bytes,
    why_not_run,
)
from .plot import Line, Panel, draw, draw_beside
from .profile import ProfilingClock, prepare_profiler
from .results import Result, Row, environment, result_path, slopes, write_json
from .text import Figures, joined

# whatever a broken case raises is its row, and others are still run
BROKEN = (Exception,)
# tokens of a first call, of which one more gap counts than settles
FIRST_TOKENS = SETTLING + 2


@dataclass(frozen=True)
class Generation:
    """What is generated, and by which models.

    Attributes:
        contexts: tokens of the prompt, and rows of the batch.
        model: a shape ("1b", "smollm2-135m"), or the folder or hub id of a dense decoder.
        pattern: of every layer of ours.
        cases: names of `CASES`.
        tokens: new tokens.
        chunk: tokens of the prompt that are read at a time; None is all at once.
        dtype: "fp32", "bf16" or "fp16", of weights, activations and caches; by default bf16 on a GPU, fp32 on a CPU.
        budget_s: seconds after which a call stops at its next token. What took longer to read a prompt is not run on longer ones.
        limit_s: seconds after which a case is given up, compiling included.
        text: a file that prompts are taken from, where `model` is a checkpoint; None is any ids.
        draft_tokens: of each draft.
        profiles: whether a further call is watched, for what a token is made of.
    """

    contexts: tuple[tuple[int, int], ...]
    model: str = "smollm2-135m"
    pattern: str = "window(4095, 0) | first(4)"
    cases: tuple[str, ...] = tuple(CASES)
    tokens: int = 64
    chunk: int | None = None
    dtype: str | None = None
    budget_s: float = 60.0
    limit_s: float = 300.0
    text: str | None = None
    draft_tokens: int = 20
    profiles: bool = False

    def __post_init__(self):
        if self.dtype is not None:
            check_dtype(self.dtype)
        unknown = sorted(set(self.cases) - set(CASES))
        if unknown or not self.cases:
            raise ValueError(f"unknown cases {unknown}; the known ones are {', '.join(CASES)}")
        if not self.contexts or min(min(context) for context in self.contexts) < 1:
            raise ValueError(
                "contexts need at least one entry, and each at least 1 token and 1 row, like '4096,32768x8'"
            )
        if self.tokens < FIRST_TOKENS:
            raise ValueError(
                f"tokens is {self.tokens}; it must be at least {FIRST_TOKENS}, since the first {SETTLING} settle"
            )
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1")
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens is {self.draft_tokens}; it must be at least 1")
        build_plan(self.pattern, 1)


def run_generate(asked: Generation, device: str | None = None, out: str | Path | None = None) -> Result:
    """Time `model.generate`, print a table, and write figures and a picture.

    A dense decoder runs as Transformers' class, with its own cache and with a static one, which `generate` compiles on a GPU; ours has
    the same weights and runs with these and with a streaming cache. It also drafts for the dense one, which then gives tokens of its
    own, several at a time; the row says how many are those of the dense model alone. Times are the clock's, noted by a streamer, so
    that they hold all that `generate` does between two tokens.

    Each case has a first call, in which kernels and graphs are compiled, and a second one, which is timed: until the first token
    (the prompt is read), and the median gap between those that follow, but for the first few, whose excess is told apart. A second call
    whose prompt would take more than half the budget is left out; the row's `calls` says so.

    Correctness comes first: of a few tokens that `generate` gives behind a shorter prompt, logits are compared with those of the
    dense model that has the pattern as its mask, in float32. They may be no farther from it than twice as far as that model is in
    `dtype`. A case that is wrong, broken, out of memory or too slow has rows that say so.

    Args:
        asked: models, prompts and limits.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        out: where to write the result (JSON); in a folder, as `<machine>/<date>-generate.json`. A picture stands beside it
            where matplotlib is installed.

    Raises:
        ValueError: an unknown dtype, device, case or model, or a bad pattern.
    """
    target, console = chosen_device(device), Console(stderr=True)
    dtype = asked.dtype or ("bf16" if target.type == "cuda" else "fp32")
    longest = max(n for n, _ in asked.contexts) + asked.tokens
    with console.status("making the models"):
        models = load_models(asked.model, asked.pattern, longest, dtype, target, asked.text)
        models.ours.generation_config.num_assistant_tokens = asked.draft_tokens
        if asked.profiles:
            prepare_profiler(target)
    facts = environment(target)
    rows: list[Row] = []
    given: dict[Any, Tensor] = {}
    result: Result = {"benchmark": "generate", "environment": facts, **asdict(asked), "dtype": dtype}
    # files and folders are named in a result, not where they lie
    result["text"] = asked.text and Path(asked.text).name
    result["model"] = Path(asked.model).name if Path(asked.model).is_dir() else asked.model
    result["pattern"] = str(Pattern.parse(asked.pattern))
    result["weights_bytes"] = sum(weight.nbytes for weight in models.dense.parameters())
    with console.status("comparing"):
        result["checked"] = checked = _check(models, asked, dtype)
    result["rows"] = rows
    path = None if out is None else result_path(out, facts, "generate")
    refused = [
        {"name": CASES[key].name, "failed": found["failed"]} for key, found in checked.items() if found.get("failed")
    ]
    for row in _rows(asked):
        reason = why_not_run(
            row, refused + [r for r in rows if r["rows"] == row["rows"]], ("prefill_s",), asked.budget_s
        )
        with console.status(f"{row['name']}: {_heading(row)}"):
            work = partial(_figures, models, row, asked)
            rows.append({**row, "failed": reason} if reason else measured(row, work, BROKEN))
        _compare_tokens(models, rows[-1], given)
        print_row(rows[-1], _figures_text, console)
        _add_ratios(rows)
        fewest = min(r["rows"] for r in rows)
        result["slopes"] = slopes([r for r in rows if r["rows"] == fewest], ("prefill_s", "token_s", "peak_bytes"))
        result["longest_by_shortest"] = dict(_longest_by_shortest(rows))
        if path is not None:
            # what is measured stays, whatever happens to the next row
            write_json(result, path)
        if rows[-1].get("failed") and not _is_alive(target):
            console.print("the GPU answers no more, so that nothing else is run", highlight=False)
            break
    _table(result).print(Console())
    draw_beside(path, result, plot_generate, console)
    return result


def _rows(asked: Generation) -> Iterator[Row]:
    # longer prompts of as many rows come later, so that what is too slow for one is not run on them
    for n, rows in sorted(asked.contexts, key=lambda context: context[::-1]):
        for key in asked.cases:
            yield {"name": CASES[key].name, "case": key, "kind": CASES[key].kind, "n": n, "rows": rows}


def _heading(row: Row) -> str:
    return f"{row['n']:,} tokens" + (f", {row['rows']} rows" if row["rows"] > 1 else "")


def _check(models: Models, asked: Generation, dtype: str) -> dict[str, Row]:
    """Errors of each case, or under "failed" what is wrong with it."""
    prompt = make_prompt(models, max(min(rows, 2) for _, rows in asked.contexts))
    generated, found = {}, {}
    for key in asked.cases:
        case = CASES[key]

        def work(case: Case = case) -> Row:
            with time_limit(asked.limit_s):
                # drafts are of one row
                ids = prompt.ids[:1] if case.kind == "drafted" else prompt.ids
                out = _generate(models, case, ids, asked, new_tokens=COMPARED_STEPS, output_logits=True)
            tokens = out.sequences[:, prompt.ids.shape[1] :]
            return {"generated": (case, tokens, torch.stack(out.logits, 1))}

        row = measured({}, work, BROKEN)
        if row.get("failed"):
            found[key] = row
        else:
            generated[key] = row["generated"]
        _forget(models)
    row = measured({}, lambda: compare(models, prompt, generated, dtype), BROKEN)
    _forget(models)
    if row.get("failed"):
        return found | {key: {"failed": f"not compared: {row['failed']}"} for key in generated}
    return found | row


def _generate(
    models: Models, case: Case, ids: Tensor, asked: Generation, new_tokens: int | None = None, **given
) -> Any:
    """One call of `generate`: greedy, and to the last token."""
    given = {
        "cache_implementation": case.cache,
        "do_sample": False,
        "max_new_tokens": new_tokens or asked.tokens,
        **given,
    }
    if asked.chunk:
        given["prefill_chunk_size"] = asked.chunk
    if case.kind == "drafted":
        given["assistant_model"] = models.ours
    generate: Any = models.of(case).generate
    return generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **given)


def _forget(models: Models) -> None:
    """Drop what was compiled, how long the last static cache was, and memory that nothing holds."""
    for model in (models.dense, models.ours):
        for name in ("_compiled_call", "_previous_max_cache_length"):
            vars(model).pop(name, None)
    forget_compiled(models.dense.device)
    torch._dynamo.utils.counters.clear()


def _figures(models: Models, row: Row, asked: Generation) -> Row:
    case, device = CASES[row["case"]], models.dense.device
    _forget(models)
    ids = models.prompt(row["rows"], row["n"])
    found, before = {}, used_bytes(device)

    def call(tokens: int, clock: Clock) -> None:
        # where drafts come, the clock has a token before it is asked whether to stop
        stop = Stop(clock, tokens + (case.kind == "drafted"), asked.budget_s)
        out = _generate(models, case, ids, asked, streamer=clock, stopping_criteria=StoppingCriteriaList([stop]))
        found["cache_bytes"] = _bytes(getattr(out, "cache", None) or out.past_key_values)
        found["given"] = out.sequences[:, row["n"] :].cpu()

    def last_call(tokens: int) -> None:
        call(tokens, clock := Clock())
        found["times"] = read_times(clock)

    with time_limit(asked.limit_s):
        begin = time.perf_counter()
        found["peak_bytes"] = peak_bytes(partial(last_call, FIRST_TOKENS), device, before)
        found["first_call_s"] = time.perf_counter() - begin
        found["calls"] = 1
        if found["times"].prefill_s <= asked.budget_s / 2:
            found["calls"] = 2
            found["peak_bytes"] = peak_bytes(partial(last_call, asked.tokens), device, before)
        if asked.profiles and found["calls"] == 2:
            found["profile"] = measured({}, lambda: _profile(partial(call, asked.tokens), device), BROKEN)
    taken: Times = found.pop("times")
    if taken.token_s is None:
        raise OvertimeError(
            f"stopped after {taken.tokens} tokens, of which the first came after {taken.prefill_s:,.1f} s"
        )
    counters = torch._dynamo.utils.counters
    found["graphs"] = counters["stats"]["unique_graphs"]
    found["graph_breaks"] = sum(counters["graph_break"].values())
    # what the first call took beyond what its tokens take
    usual_s = taken.prefill_s + (FIRST_TOKENS - 1) * taken.token_s
    found["compiling_s"] = max(0.0, found["first_call_s"] - usual_s) if found["calls"] == 2 else None
    return {**found, **asdict(taken), "tokens_per_s": row["rows"] / taken.token_s}


def _profile(call: Callable[[Clock], None], device: torch.device) -> Row:
    clock = ProfilingClock(device)
    try:
        call(clock)
    finally:
        clock.stop()
    return clock.figures()


def _compare_tokens(models: Models, row: Row, given: dict[Any, Tensor]) -> None:
    """Of the dense model's tokens, how many are those of its first case, up to the first other one, and how close that was.

    Args:
        row: of a case that ran; its tokens are taken from it.
        given: tokens of the first dense case by context.
    """
    tokens, context = row.pop("given", None), (row["n"], row["rows"])
    if tokens is None or row["kind"] == "ours":
        return
    if context not in given:
        if row["kind"] == "dense":
            given[context] = tokens
        return
    both = min(tokens.shape[1], given[context].shape[1])
    tokens, right = tokens[0, :both], given[context][0, :both]
    same = int((tokens == right).long().cumprod(0).sum())
    row["same_tokens"], row["compared_tokens"] = same, both
    if same < both:
        found = measured({}, lambda: _margin(models, context, right[: same + 1], tokens[same]), BROKEN)
        row["first_other"] = found


@torch.no_grad()
def _margin(models: Models, context: tuple[int, int], right: Tensor, other: Tensor) -> Row:
    """By how much the logit of the last of the tokens `right` `[N]` is above that of another, in one pass without a cache.

    The difference counts as a tie where it is that of neighbouring numbers of the dtype.
    """
    n, rows = context
    ids = torch.cat((models.prompt(rows, n)[:1], right[None, :-1].to(models.dense.device)), 1)
    logits = models.dense(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    best = logits[right[-1]].abs()
    spacing = float(torch.nextafter(best, torch.full_like(best, torch.inf)) - best)
    return {"margin": float(logits[right[-1]].float() - logits[other].float()), "spacing": spacing}


def _bytes(cache: Cache) -> int:
    """What a cache holds: keys, values, and all else that its layers keep."""
    layers: Sequence[Any] = cache.layers
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for layer in layers for t in _tensors(vars(layer))
    }
    return sum(found.values())


def _tensors(members: dict[str, Any]) -> Iterator[Tensor]:
    return (value for value in members.values() if isinstance(value, Tensor))


def _is_alive(device: torch.device) -> bool:
    """Does the device still compute? An illegal access ends all that a process has on a GPU."""
    if device.type != "cuda":
        return True
    try:
        return bool(torch.ones(1, device=device).cpu().item())
    except RuntimeError:
        return False


def _figures_text(row: Row) -> str:
    return (
        f"{row['rows']} row(s): first call {duration(row['first_call_s'])}, then read in {duration(row['prefill_s'])}, "
        f"{duration(row['token_s'])} a token, cache {size(row['cache_bytes'])}"
    )


def _add_ratios(rows: Sequence[Row]) -> None:
    """How many times faster a token is than of each dense case that ran, and than of the fastest."""
    done = [row for row in rows if not row.get("failed")]
    for row in (r for r in done if r["kind"] != "dense"):
        beside = [r for r in done if r["kind"] == "dense" and (r["n"], r["rows"]) == (row["n"], row["rows"])]
        row["times_faster"] = {other["case"]: other["token_s"] / row["token_s"] for other in beside}
        row["times_faster_than_best"] = min(row["times_faster"].values(), default=None)


def _longest_by_shortest(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    """How much longer a token takes at most than at least, over contexts of one row."""
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [row["token_s"] for row in rows if row["name"] == name and row["rows"] == 1 and not row.get("failed")]
        if len(found) > 1:
            yield name, max(found) / min(found)


def _title(result: Result) -> str:
    return f"model.generate under {result['pattern']}: {result['model']}, {result['dtype']}, {result['environment']['hardware']}"


def _table(result: Result) -> Figures:
    columns = ("", "1st call", "reading", "a token", "tokens/s", "cache", "peak", "faster")
    table = Figures(_title(result), columns)
    for row in result["rows"]:
        if row.get("failed"):
            table.fail(_heading(row), row["name"], row["failed"])
            continue
        spent = (duration(row[key]) for key in ("first_call_s", "prefill_s", "token_s"))
        held = (size(row[key]) for key in ("cache_bytes", "peak_bytes"))
        faster = times(row.get("times_faster_than_best"))
        if row.get("compared_tokens"):
            at_a_time = f"{row['tokens_a_pass']:.1f} tokens at a time; " if row["kind"] == "drafted" else ""
            table.notes.append(
                f"{row['name']}, {_heading(row)}: {at_a_time}the first {row['same_tokens']:,} of {row['compared_tokens']:,} are those "
                f"of the dense model alone{_how_close(row.get('first_other'))}"
            )
        table.add(
            _heading(row), row["name"], *spent, f"{row['tokens_per_s']:,.0f}" if row["rows"] > 1 else "", *held, faster
        )
    table.notes.append(f"faster: than the faster dense case; peak: beside weights of {size(result['weights_bytes'])}")
    if result["longest_by_shortest"]:
        table.notes.append(f"slowest context's token by fastest's: {joined(result['longest_by_shortest'].items())}")
    return table


def _how_close(found: Row | None) -> str:
    if found is None or found.get("failed"):
        return ""
    return f", whose logit of the next is {found['margin']:.2g} above; neighbours are {found['spacing']:.2g} apart"


def plot_generate(result: Result, path: Path) -> None:
    """Draw time a token against the context, a panel for each number of rows, and what caches hold."""
    colors = {case.name: f"C{number}" for number, case in enumerate(CASES.values())}
    done = sorted((row for row in result["rows"] if not row.get("failed")), key=lambda row: (row["rows"], row["n"]))

    def panel(values: str, rows: Sequence[Row], key: str, scale: float) -> Panel:
        named = {name: [(r["n"], r[key] * scale) for r in rows if r["name"] == name] for name in colors}
        styles = {case.name: "--" if case.kind == "dense" else "-" for case in CASES.values()}
        return Panel(values, [Line(name, of, colors[name], styles[name]) for name, of in named.items() if of])

    panels = []
    for rows, members in groupby(done, key=lambda row: row["rows"]):
        members = list(members)
        whose = "1 row" if rows == 1 else f"{rows} rows"
        panels.append(panel(f"a token, ms ({whose})", members, "token_s", 1e3))
        panels.append(panel(f"cache, MiB ({whose})", members, "cache_bytes", 2**-20))
    versions = result["environment"]["versions"]
    draw(panels, f"{_title(result)}, torch {versions['torch']}, transformers {versions['transformers']}", path)
