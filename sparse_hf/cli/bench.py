"""`sparse-hf bench`: the commands that measure."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import OUT_HELP, PATTERN_HELP, numbers, read_cases, read_contexts, read_folder, read_lengths, words

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and the table to standard error.")]


def attention(
    lengths: Annotated[str, typer.Option(help="Tokens, ascending.")] = "4096,16384,65536",
    pattern: Annotated[str, typer.Option(help=PATTERN_HELP)] = "window(511, 0)",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; by default as many as query heads.")] = None,
    head_dim: Annotated[int, typer.Option(help="Numbers per head.")] = 64,
    value_dim: Annotated[
        int | None, typer.Option(help="Numbers per head of values, where they are other (192 and 128 in DeepSeek V3).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    backends: Annotated[str, typer.Option(help="Backends, with commas; by default all but the reference.")] = "",
    budget: Annotated[
        float, typer.Option(help="Seconds per figure; dense attention stops where it would take longer.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time one attention layer, forward and backward, length by length.

    Beside it run dense SDPA, the window kernels of others, and the sparse attention of other
    packages that are installed.
    """
    from ..bench import run_attention

    run = partial(
        run_attention,
        read_lengths(lengths),
        pattern,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        device=device,
        backends=words(backends) or None,
        budget=budget,
        out=out,
        plot=plot,
    )
    _print(run, as_json)


def chosen(
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "2048,8192,32768,131072",
    shape: Annotated[str, typer.Option(help="Widths of the layer: deepseek_v32, or tiny for a CPU.")] = "deepseek_v32",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    training: Annotated[bool, typer.Option(help="Time a training step of short texts as well.")] = True,
    budget: Annotated[
        float, typer.Option(help="Seconds per figure; what took longer is not run on longer texts.")
    ] = 20,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    as_json: AsJson = False,
) -> None:
    """Time one layer that chooses its keys by an indexer, beside Transformers' class.

    Scores and attention are timed alone as well.
    """
    from ..bench import run_chosen

    run = partial(
        run_chosen, read_lengths(lengths), shape, dtype=dtype, device=device, training=training, budget=budget, out=out
    )
    _print(run, as_json)


def models(
    models: Annotated[
        str,
        typer.Option(
            help="Any of bert, longformer, big_bird, reformer, perceiver, sparse_transformer, modernbert, mistral, llama_1b, "
            "gpt_oss, gpt_oss_window, whisper, vit, with commas."
        ),
    ] = "longformer,big_bird,bert",
    lengths: Annotated[
        str,
        typer.Option(
            help="Tokens, ascending: of whisper positions of 20 ms, of vit patches of a square picture and a class token (197 "
            "is 224 x 224 pixels)."
        ),
    ] = "4096,16384",
    layers: Annotated[int, typer.Option(help="Layers of each model.")] = 12,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    training: Annotated[bool, typer.Option(help="Time a training step as well.")] = True,
    compile_mode: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="Time ours under torch.compile in this mode (default, reduce-overhead), theirs with and without.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Gradient checkpointing: keep no activations inside layers.")
    ] = False,
    budget: Annotated[
        float, typer.Option(help="Seconds per figure; a model that took longer is not run on longer texts.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time whole models with random weights beside Transformers' classes.

    Forward and training step, length by length; modernbert, mistral and gpt_oss beside Transformers'
    sliding windows on sdpa or eager, and on flex_attention.
    """
    from ..bench import run_models

    run = partial(
        run_models,
        words(models),
        read_lengths(lengths),
        layers=layers,
        batch=batch,
        dtype=dtype,
        device=device,
        training=training,
        compile_mode=compile_mode,
        checkpointing=checkpointing,
        budget=budget,
        out=out,
        plot=plot,
    )
    _print(run, as_json)


def plan(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help=f"{PATTERN_HELP} By default a window, one with sinks, longformer() and bigbird()."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "16384,65536,262144,1048576",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda, which is to hold the tables; by default the GPU if there is one.")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Seconds; a pattern that took longer is not planned for longer texts.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what the tables of patterns take to build and to keep, length by length.

    The tables are compared with the patterns first.
    """
    from ..bench import PLAN_PATTERNS, run_plan

    run = partial(run_plan, device=device, budget=budget, out=out, plot=plot)
    _print(partial(run, patterns or PLAN_PATTERNS, read_lengths(lengths)), as_json)


def generate(
    contexts: Annotated[
        str, typer.Option(help="Tokens of the prompt; with rows of the batch behind an x, as in '4096,32768x8'.")
    ] = "1024,4096,16384",
    shape: Annotated[
        str, typer.Option(help="The dense model: 1b or smollm2-135m, a Llama of that shape with random weights.")
    ] = "smollm2-135m",
    model: Annotated[
        str | None, typer.Option(help="Instead of a shape: the folder or hub id of a dense decoder.")
    ] = None,
    pattern: Annotated[str, typer.Option(help=PATTERN_HELP)] = "window(4095, 0) | first(4)",
    cases: Annotated[
        str,
        typer.Option(
            help="Any of dense-dynamic, dense-static (which a GPU compiles), dynamic, streaming, static, draft (dense, with ours "
            "as its assistant), with commas; by default all."
        ),
    ] = "",
    tokens: Annotated[int, typer.Option(help="New tokens; the median gap between them counts.")] = 64,
    text: Annotated[
        Path | None, typer.Option(help="A file that prompts are taken from, with --model; by default any tokens.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="Tokens of each draft.")] = 20,
    profile: Annotated[
        bool, typer.Option(help="Watch a further call: a token's kernels and the host's calls, in the result.")
    ] = False,
    chunk: Annotated[
        int | None, typer.Option(help="Read the prompt by so many tokens at a time; by default all at once.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default bf16 on a GPU and fp32 on a CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    budget: Annotated[
        float,
        typer.Option(
            help="Seconds after which a call stops at its next token; a case that took longer to read a prompt is not run on "
            "longer ones."
        ),
    ] = 60,
    limit: Annotated[float, typer.Option(help="Seconds after which a case is given up, compiling included.")] = 300,
    out: Annotated[Path | None, typer.Option(help=f"{OUT_HELP} A picture stands beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time all that `model.generate` does, prompt by prompt: tokens, first calls, memory.

    A sparse decoder runs beside the dense one with the same weights, each with several caches. Dense
    with a static cache is Transformers at its fastest.
    """
    from ..bench import SHAPES, Generation, run_generate

    if model is None and shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; the known ones are {', '.join(SHAPES)}")
    asked = Generation(
        read_contexts(contexts),
        read_folder(model) if model else shape,
        pattern,
        tokens=tokens,
        chunk=chunk,
        dtype=dtype,
        text=None if text is None else str(text),
        draft_tokens=draft_tokens,
        profiles=profile,
    )
    limits = {"budget_s": budget, "limit_s": limit}
    asked = replace(asked, **limits, **({"cases": tuple(words(cases))} if cases else {}))
    result = _print(partial(run_generate, asked, device, out), as_json)
    if any(found.get("failed", "").startswith("wrong") for found in result["checked"].values()):
        raise typer.Exit(1)


def memory(
    cases: Annotated[
        str,
        typer.Option(
            help="Shapes (1b, 8b, smollm2-135m, bert) with the tokens of a text, with commas; random weights."
        ),
    ] = "smollm2-135m:4096",
    ways: Annotated[
        str, typer.Option(help="Any of plain, checkpointing, long_text, offload, with commas.")
    ] = "plain,checkpointing,long_text",
    pattern: Annotated[str | None, typer.Option(help=f"{PATTERN_HELP} By default a window with first tokens.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default bf16 on a GPU and fp32 on a CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed, after one that is not; 0 times the first one.")] = 3,
    budget: Annotated[float, typer.Option(help="Seconds of a row after which no further step begins.")] = 20,
    out: Annotated[Path | None, typer.Option(help=f"{OUT_HELP} A picture stands beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a training step on a long text holds and takes, with and without `long_text`.

    Gradients are compared first.
    """
    from ..bench import LongSteps, run_memory

    asked = LongSteps(read_cases(cases), tuple(words(ways)), pattern, dtype, steps, budget)
    result = _print(partial(run_memory, asked, device, out), as_json)
    if any(found.get("failed") for found in result["compared"].values()):
        raise typer.Exit(1)


def sequence(
    processes: Annotated[
        str, typer.Option(help="Numbers of processes, a GPU each, ascending; of each, steps are timed.")
    ] = "1,2,4",
    tokens: Annotated[int, typer.Option(help="Tokens of the text that each number of processes shares.")] = 1 << 20,
    tokens_each: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a process where the text grows with them, by default --tokens; 0 leaves that out."
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help="1b, smollm2-135m, 8b or tiny: a Llama with random weights.")] = "1b",
    large_shape: Annotated[
        str | None, typer.Option(help="A larger one, trained by the most processes with FSDP2 beside, like 8b.")
    ] = None,
    ring: Annotated[str, typer.Option(help="Lengths at which torch's ring of dense attention runs beside.")] = "",
    pattern: Annotated[str, typer.Option(help=PATTERN_HELP)] = "window(1023, 0) | first(4)",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default bf16 on GPUs and fp32 on CPUs.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default GPUs if there are any.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which a case is given up.")] = 120,
    budget: Annotated[float, typer.Option(help="Seconds after which no further case begins.")] = 600,
    offload: Annotated[bool, typer.Option(help="Keep the inputs of layers in the host's memory.")] = False,
    out: Annotated[Path | None, typer.Option(help=f"{OUT_HELP} A picture stands beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time training steps on texts that several processes share, on more and more of them.

    Gradients are compared with the dense model first. Processes are started here: run it without
    torchrun.
    """
    from ..bench import SharedTexts, run_sequence

    each = tokens if tokens_each is None else tokens_each
    asked = SharedTexts(
        tuple(numbers(processes)), tokens, each or None, shape, large_shape, tuple(numbers(ring)), pattern, dtype,
        limit, budget, offload,
    )  # fmt: skip
    result = _print(partial(run_sequence, asked, device, out), as_json)
    if any(row.get("failed", "").startswith("wrong") for row in result["rows"]):
        raise typer.Exit(1)


def _print(run: Callable[[], dict[str, Any]], as_json: bool) -> dict[str, Any]:
    """Run a benchmark, which prints its table; if JSON is wanted, that goes to standard error."""
    if not as_json:
        return run()
    with contextlib.redirect_stdout(sys.stderr):
        result = run()
    typer.echo(json.dumps(result, indent=1))
    return result
