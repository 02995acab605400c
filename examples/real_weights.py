"""Real checkpoints, dense beside sparse.

They give the same answers under a window as long as the text; a narrow one costs what is measured.

A narrow window is also held against the dense model that is given the pattern as its mask. Every
checkpoint is converted by `sparse_hf.convert` and measured in a process of its own, in float32 on
the CPU.

    python examples/real_weights.py
    python examples/real_weights.py --only rxnmapper minilm
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLNetConfig,
    XLNetModel,
)

import sparse_hf
from examples.assets import CACHE
from examples.checkpoints import CHECKPOINTS, checkpoint
from examples.texts import (
    IGNORED,
    Batch,
    chapters,
    hidden_tokens,
    long_texts,
    novel,
    one_pot,
    paragraphs,
    reactions,
    sentences,
    stories,
    texts,
)
from sparse_hf.bench import environment, latest_result, result_path, write_json

RESULTS, SUITE = Path(__file__).resolve().parent.parent / "docs" / "results", "real-weights"
# logits of so many tokens at a time: all 2,048 of a large vocabulary would be 2 GB
CHUNK = 256


@dataclass(frozen=True)
class Measure:
    """What one pattern makes of one text."""

    name: str
    pattern: str
    batch: Callable[[PreTrainedTokenizerBase], Batch]


@dataclass(frozen=True)
class Case:
    auto: type
    measures: tuple[Measure, ...]


LONG, NARROW = "window(511, 511)", "window(32, 32) | first(1)"


def decoder(batch: Callable = novel, long: str = "window(2047, 0)", narrow: str = "window(255, 0) | first(4)") -> Case:
    return Case(AutoModelForCausalLM, (Measure("long", long, batch), Measure("narrow", narrow, batch)))


def encoder() -> Case:
    return Case(AutoModel, (Measure("long", LONG, paragraphs), Measure("narrow", NARROW, chapters)))


def chemistry(auto: type, wrap: Callable = hidden_tokens) -> Case:
    return Case(
        auto,
        (
            Measure("long", LONG, wrap(reactions)),
            Measure("narrow", NARROW, wrap(one_pot)),
            Measure("narrow, as they come", NARROW, wrap(reactions)),
        ),
    )


CASES = {
    "smollm2": decoder(),
    "qwen2.5-coder-0.5b": decoder(),
    "gemma3-270m": decoder(),
    "stories15m": decoder(stories, "window(255, 0)", "window(63, 0) | first(4)"),
    "minilm": encoder(),
    "gte-small": encoder(),
    "rxnmapper": chemistry(AutoModelForMaskedLM),
    "rxnfp-mlm": chemistry(AutoModelForMaskedLM),
    "rxnfp-classifier": chemistry(AutoModelForSequenceClassification, lambda batch: batch),
    "distilbert-grammar": Case(
        AutoModelForTokenClassification,
        (
            Measure("long", LONG, sentences),
            Measure("narrow", NARROW, long_texts),
            Measure("narrow, as long as in training", NARROW, texts),
        ),
    ),
}
XLNET = "xlnet"


def measure(name: str) -> dict:
    """One checkpoint's entry."""
    case, dense_folder = CASES[name], checkpoint(name)
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    # texts are cut here, so that a longer one is no reason to warn
    tokenizer.model_max_length = 1 << 30
    compare = compare_embeddings if case.auto is AutoModel else compare_predictions
    dense = load(case.auto, dense_folder)
    entry = {
        "package": CHECKPOINTS[name].package,
        "dense_class": type(dense).__name__,
        "parameters": dense.num_parameters(),
        "measures": [],
    }
    for pattern in dict.fromkeys(m.pattern for m in case.measures):
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            folder = sparse_hf.convert(dense_folder, Path(scratch) / "sparse", pattern, progress=False)
            sparse = load(case.auto, folder)
        entry["sparse_class"] = type(sparse).__name__
        for m in (m for m in case.measures if m.pattern == pattern):
            print(f"  {name}: {m.name}, {pattern}", flush=True)
            batch = m.batch(tokenizer)
            found = compare(dense, sparse, batch)
            if m.name != "long":
                found |= compare_masked(dense, sparse, batch)
            entry["measures"].append({"name": m.name, "pattern": pattern, **sizes(batch), **found})
    return entry


def sizes(batch: Batch) -> dict:
    lengths = batch.real.sum(1)
    return {"text": batch.text, "rows": len(lengths), "longest": int(lengths.max()), "tokens": int(lengths.sum())}


def load(auto: type, folder: Path) -> PreTrainedModel:
    """Load in float32; a weight that is missing or left over raises."""
    # some bare encoders come without a pooler
    options = {"add_pooling_layer": False} if auto is AutoModel else {}
    model, found = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    left = {key for key in found["unexpected_keys"] if not key.startswith("pooler.")}
    if found["missing_keys"] or left or found["mismatched_keys"]:
        raise RuntimeError(f"{folder} does not fit {type(model).__name__}: {found}")
    return model.eval()


@torch.inference_mode()
def compare_predictions(dense: PreTrainedModel, sparse: PreTrainedModel, batch: Batch) -> dict:
    """What both say of each token that is no padding, or of each text."""
    largest = difference = 0.0
    labels, losses = ([], []), ([], [])
    targets = None if batch.targets is None else batch.targets[batch.real].split(CHUNK)
    for i, both in enumerate(zip(predictions(dense, batch), predictions(sparse, batch), strict=True)):
        largest = max(largest, float(both[0].abs().max()))
        difference = max(difference, float((both[0] - both[1]).abs().max()))
        for logits, chosen, lost in zip(both, labels, losses, strict=True):
            chosen.append(logits.argmax(-1))
            if targets is not None:
                lost.append(
                    torch.nn.functional.cross_entropy(logits, targets[i], reduction="sum", ignore_index=IGNORED)
                )
    labels = [torch.cat(chosen) for chosen in labels]
    same = labels[0] == labels[1]
    found = {
        "predictions": len(same),
        "same": float(same.float().mean()),
        "max_abs_diff": difference,
        "max_abs_dense": largest,
    }
    if targets is not None:
        wanted = torch.cat(targets)
        counted = wanted != IGNORED
        for which, chosen, lost in zip(("dense", "sparse"), labels, losses, strict=True):
            found[f"{which}_perplexity"] = float((sum(lost) / counted.sum()).exp())
            found[f"{which}_top1"] = float((chosen == wanted)[counted].float().mean())
    elif len(same) > len(batch.ids):
        # most tokens of a sentence are right, and label 0 says so
        edits = [chosen != 0 for chosen in labels]
        found |= {
            "dense_edits": int(edits[0].sum()),
            "sparse_edits": int(edits[1].sum()),
            "same_edits": int((same & edits[0]).sum()),
        }
    return found


@torch.inference_mode()
def compare_masked(dense: PreTrainedModel, sparse: PreTrainedModel, batch: Batch) -> dict:
    """Compare with the dense model that has each layer's pattern as its mask."""
    both = zip(predictions(dense, batch, masks(sparse, batch)), predictions(sparse, batch), strict=True)
    return {"masked_max_abs_diff": max(float((a - b).abs().max()) for a, b in both)}


def masks(sparse: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """[rows, 1, tokens, tokens], true where a query sees a key.

    There is one for each type of layers, if there are several.
    """
    config, length = sparse.config, batch.ids.shape[1]
    kinds = getattr(config, "layer_types", None) or ["all"] * config.num_hidden_layers
    at = torch.arange(length)
    found = {}
    for kind in dict.fromkeys(kinds):
        text = config.layer_pattern(kinds.index(kind), is_causal=hasattr(sparse, "lm_head"))
        seen = sparse_hf.Pattern.parse(text).allows(at[:, None], at[None, :])
        found[kind] = seen & batch.real[:, None, None, :]
    return found if len(found) > 1 else found.popitem()[1]


def predictions(model: PreTrainedModel, batch: Batch, mask: Tensor | dict | None = None) -> Iterator[Tensor]:
    """Logits [tokens or rows, classes] in chunks, of real tokens only.

    Of a model without a head, its last states.
    """
    mask = batch.real.long() if mask is None else mask
    if hasattr(model, "lm_head"):
        states = model.model(input_ids=batch.ids, attention_mask=mask, use_cache=False).last_hidden_state
        yield from (model.lm_head(part) for part in states[batch.real].split(CHUNK))
        return
    output = model(input_ids=batch.ids, attention_mask=mask)
    found = output.last_hidden_state if "last_hidden_state" in output else output.logits
    yield from (found[batch.real] if found.dim() == 3 else found).split(CHUNK)


@torch.inference_mode()
def compare_embeddings(dense: PreTrainedModel, sparse: PreTrainedModel, batch: Batch) -> dict:
    """Of tokens, and of texts as the mean over their tokens."""
    states = [
        model(input_ids=batch.ids, attention_mask=batch.real.long()).last_hidden_state for model in (dense, sparse)
    ]
    tokens = [s[batch.real] for s in states]
    texts = [(s * batch.real[..., None]).sum(1) / batch.real.sum(1, keepdim=True) for s in states]
    of_tokens, of_texts = torch.cosine_similarity(*tokens, dim=-1), torch.cosine_similarity(*texts, dim=-1)
    return {
        "max_abs_diff": float((tokens[0] - tokens[1]).abs().max()),
        "max_abs_dense": float(tokens[0].abs().max()),
        "token_cosine": float(of_tokens.mean()),
        "text_cosine": float(of_texts.mean()),
        "least_text_cosine": float(of_texts.min()),
    }


def refusal() -> dict:
    """What conversion says to a small XLNet, which computes attention by itself."""
    with tempfile.TemporaryDirectory() as scratch:
        XLNetModel(XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64)).save_pretrained(Path(scratch) / "dense")
        try:
            sparse_hf.convert(Path(scratch) / "dense", Path(scratch) / "sparse", NARROW, progress=False)
        except ValueError as error:
            return {"package": None, "dense_class": "XLNetModel", "weights": "random", "refused": str(error)}
    raise RuntimeError("an XLNet model was converted, though no pattern reaches its attention")


def in_own_process(name: str) -> dict:
    """Apart, so that all its memory is given back."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "entry.json"
        command = [sys.executable, __file__, "--measure", name, "--out", str(file)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"measuring {name} failed")
        return json.loads(file.read_text())


def earlier(out: Path, here: dict) -> dict:
    """Entries of an earlier run on this machine with these versions."""
    if not out.exists():
        return {}
    found = json.loads(out.read_text())
    alike = all(found["environment"].get(key) == value for key, value in here.items() if key != "date")
    return found["checkpoints"] if alike else {}


def table(entries: dict[str, dict]) -> Table:
    shown = Table(title="real weights, dense beside sparse")
    for column in (
        "checkpoint",
        "class",
        "pattern",
        "text",
        "tokens",
        "same argmax",
        "max |diff|",
        "from masked",
        "quality",
    ):
        shown.add_column(
            column, justify="right" if column in ("tokens", "same argmax", "max |diff|", "from masked") else "left"
        )
    for name, entry in entries.items():
        if "refused" in entry:
            shown.add_row(name, entry["dense_class"], "", "refused", "", "", "", "", entry["refused"].split(";")[0])
        for m in entry.get("measures", ()):
            same = f"{m['same']:.2%}" if "same" in m else ""
            tokens = f"{m['rows']} x {m['longest']}" if m["rows"] > 1 else str(m["longest"])
            shown.add_row(
                name,
                entry["sparse_class"],
                m["pattern"],
                m["text"],
                tokens,
                same,
                f"{m['max_abs_diff']:.1e}",
                f"{m['masked_max_abs_diff']:.1e}" if "masked_max_abs_diff" in m else "",
                quality(m),
            )
    return shown


def differs(m: dict) -> bool:
    """Do answers differ beyond rounding?

    Under a window as long as the text, or from the dense model with the pattern as its mask.
    """
    difference = m["max_abs_diff"] if m["name"] == "long" else m["masked_max_abs_diff"]
    return difference > 1e-3 * m["max_abs_dense"]


def quality(m: dict) -> str:
    if "text_cosine" in m:
        return f"cosine of texts {m['text_cosine']:.4f}, of tokens {m['token_cosine']:.4f}"
    if "same_edits" in m:
        return f"edits {m['dense_edits']} -> {m['sparse_edits']}, {m['same_edits']} the same"
    if "dense_perplexity" in m:
        return (
            f"perplexity {m['dense_perplexity']:.2f} -> {m['sparse_perplexity']:.2f}, "
            f"top-1 {m['dense_top1']:.1%} -> {m['sparse_top1']:.1%}"
        )
    return ""


def main() -> None:
    names = [*CASES, XLNET]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--out", type=Path, help="by default a file of docs/results: today's, or with --only the newest"
    )
    parser.add_argument("--measure", choices=names, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.measure:
        write_json(refusal() if arguments.measure == XLNET else measure(arguments.measure), arguments.out)
        return
    here = environment(torch.device("cpu"))
    here["versions"] = {key: value for key, value in here["versions"].items() if value}
    here["versions"]["sparse-hf"] = sparse_hf.__version__
    newest = latest_result(RESULTS, here, SUITE) if arguments.only else None
    out = arguments.out or newest or result_path(RESULTS, here, SUITE)
    entries = earlier(out, here) if arguments.only else {}
    # a file keeps the date of its first run
    here = json.loads(out.read_text())["environment"] if entries else here
    chosen = arguments.only or names
    for i, name in enumerate(chosen, 1):
        print(f"{name} ({i} of {len(chosen)})", flush=True)
        entries[name] = in_own_process(name)
        ordered = {known: entries[known] for known in names if known in entries}
        # after each, so that a failure loses nothing
        write_json({"environment": here, "dtype": "float32", "checkpoints": ordered}, out)
    Console(width=200).print(table(ordered))
    print(f"written to {out}")
    unlike = [name for name in chosen if any(differs(m) for m in entries[name].get("measures", ()))]
    if unlike:
        raise SystemExit(f"dense and sparse differ where they should not: {', '.join(unlike)}")


if __name__ == "__main__":
    main()
