r"""Which section of a manual answers a question? The whole manual in one pass, beside its pieces.

A sentence encoder reads a manual whole, with a window, and with the headers of all sections seen by
every token and seeing every token. Beside it, the dense encoder reads pieces of 512 tokens, and each
section alone as far as 512 tokens. Sections are ranked by cosine to the question.

    python examples/find_section.py                     # this package's own guides, and questions about them
    python examples/find_section.py --model your/encoder --text manual.txt --header "^Chapter .*$" \
        --questions questions.json --out found.json --plot found.png
        # questions: [{"question": ..., "section": the header's line}, ...]
    python examples/find_section.py --tiny              # seconds, with a random model

It prints how often the right section comes first, and the mean of 1 / rank. Without --model it needs
the checkpoint `minilm` in the cache, or fetches it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples import tiny
from examples.checkpoints import checkpoint
from examples.studies import canvas, keep, save
from sparse_hf.bench import environment
from sparse_hf.train import MarkHeaders

GUIDES, HEADER = Path(__file__).resolve().parent.parent / "docs" / "how-to", r"^## .*$"
# tokens that the dense encoder reads, and half the width of the sparse one's window
DENSE, WINDOW = 512, 128
QUESTIONS = {
    "How do I ask a regular expression which tokens every other should see?": "## By a regular expression",
    "Can several documents share one row when I train?": "## Packed documents",
    "How can one text be spread over more than a single GPU?": "## Beyond one GPU",
    "What happens when one of the processes dies?": "## One process that fails",
    "Which layers should keep full attention?": "## Choose what stays dense",
    "When is a pattern called safe?": "## What the verdict says",
    "Does vLLM run these checkpoints?": "## vLLM",
    "Can llama.cpp or ollama load the model?": "## llama.cpp and ollama",
    "How do I run a model in ONNX Runtime?": "## ONNX",
    "Why is my model not faster than before?": "## It is no faster",
    "What can I do when memory is exhausted?": "## It runs out of memory",
    "How do I embed documents without the sentence-transformers library?": "## Without Sentence Transformers",
    "May rejected tokens be taken back from a cache?": "## Take back, fork, read in pieces",
    "How do I speed up the dense model with a draft of itself?": "## A sparse twin drafts for its dense model",
    "Can the prompt be read sparsely while answers come from full attention?": "## A sparse prompt, dense decoding",
    "How is a learned indexer trained?": "## Train an indexer",
    "Do weights in 4 bits of bitsandbytes work?": "## Packed weights of torchao and bitsandbytes",
    "How do I write a model card?": "## Describe it",
    "Where do I see a picture of a pattern?": "## Look at it",
    "How do I recover quality after the conversion by training?": "## Heal a converted model",
}


@dataclass(frozen=True)
class Section:
    """A header's line, and where the text from it on begins and ends."""

    header: str
    begin: int
    end: int


def sections(text: str, header: str) -> list[Section]:
    """The sections of a text. What stands before the first header belongs to none.

    Raises:
        ValueError: no line is a header.
    """
    found = list(re.finditer(header, text, re.MULTILINE))
    if not found:
        raise ValueError(f"no line of the text is like {header!r}; give the headers' own with --header")
    ends = [one.start() for one in found[1:]] + [len(text)]
    return [Section(one.group(), one.start(), end) for one, end in zip(found, ends, strict=True)]


@torch.inference_mode()
def means(model: PreTrainedModel, rows: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Embeddings `[n, D]` of short texts by a dense encoder, one by one."""
    found = []
    for row in rows:
        ids = tokenizer(row, truncation=True, max_length=DENSE, return_tensors="pt")
        found.append(model(**ids).last_hidden_state[0].mean(0))
    return normalize(torch.stack(found), dim=-1)


@torch.inference_mode()
def whole(
    model: PreTrainedModel, text: str, parts: list[Section], header: str, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Embeddings `[n, D]` of sections by one pass over all of them: means of the states of their tokens."""
    row = {**tokenizer(text, return_offsets_mapping=True, verbose=False), "text": text}
    offsets = torch.tensor(row["offset_mapping"])
    batch = MarkHeaders(DataCollatorWithPadding(tokenizer), f"(?m){header}")([row])
    if not model.config.uses_marks:
        del batch["global_attention_mask"]
    states = model(**batch).last_hidden_state[0]
    begins, ends = offsets.T
    inside = [(begins >= part.begin) & (ends <= part.end) & (ends > begins) for part in parts]
    return normalize(torch.stack([states[one].mean(0) for one in inside]), dim=-1)


def by_pieces(
    text: str, parts: list[Section], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Embeddings `[m, D]` of pieces of 512 tokens, and which of them `[n, m]` share a character with each section."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    step = DENSE - 2
    spans = [(offsets[at][0], offsets[min(at + step, len(offsets)) - 1][1]) for at in range(0, len(offsets), step)]
    shares = [[begin < part.end and end > part.begin for begin, end in spans] for part in parts]
    return means(model, [text[begin:end] for begin, end in spans], tokenizer), torch.tensor(shares)


def judged(scores: Tensor, wanted: list[int]) -> dict:
    """How often the right one of `[questions, sections]` comes first, and the mean of 1 / rank."""
    right = scores[torch.arange(len(wanted)), wanted]
    # those that score as much stand before it
    ranks = (scores >= right[:, None]).sum(1)
    return {"first": float((ranks == 1).double().mean()), "mean_1_by_rank": float((1 / ranks.double()).mean())}


def measure(folder: str, text: str, header: str, questions: dict[str, str]) -> dict:
    parts = sections(text, header)
    headers = [part.header for part in parts]
    absent = next((section for section in questions.values() if section not in headers), None)
    if absent is not None:
        raise ValueError(f"no section is headed {absent!r}; give headers as they stand in the text")
    wanted = [headers.index(section) for section in questions.values()]
    dense, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    length = len(tokenizer(text, verbose=False).input_ids)
    asked, found = means(dense, list(questions), tokenizer), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, pattern in (("headers", "marked()"), ("first token", "first(1)")):
            out = sparse_hf.convert(folder, Path(scratch) / pattern, f"window({WINDOW}, {WINDOW}) | {pattern}", max_length=length + 2,
                                    progress=False)  # fmt: skip
            sparse = AutoModel.from_pretrained(out).eval()
            embedded = whole(sparse, text, parts, header, tokenizer)
            found[f"whole, {name} seen by all"] = judged(asked @ embedded.T, wanted)
    alone = means(dense, [text[part.begin : part.end] for part in parts], tokenizer)
    found[f"each section alone, {DENSE} tokens at most"] = judged(asked @ alone.T, wanted)
    pieces, shares = by_pieces(text, parts, dense, tokenizer)
    of_pieces = (asked @ pieces.T)[:, None].expand(-1, len(parts), -1).masked_fill(~shares, -1)
    found[f"pieces of {DENSE} tokens"] = judged(of_pieces.amax(-1), wanted)
    return {"tokens": length, "sections": len(parts), "questions": len(questions), "ways": found}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A sentence encoder with mean pooling: a folder or a hub id.")
    parser.add_argument("--text", type=Path, help="The manual, in UTF-8.")
    parser.add_argument("--header", default=HEADER, help="A regular expression of headers; ^ and $ are ends of lines.")
    parser.add_argument("--questions", type=Path, help='JSON: [{"question": ..., "section": the header\'s line}, ...]')
    parser.add_argument("--out", type=Path, help="A file for what was found.")
    parser.add_argument("--plot", type=Path, help="A picture of it.")
    parser.add_argument("--plot-only", action="store_true", help="Draw what --out holds.")
    parser.add_argument("--tiny", action="store_true", help="A random model of two layers.")
    args = parser.parse_args(arguments)
    if args.plot_only:
        found = json.loads(args.out.read_text(encoding="utf-8"))
        plot(found, args.plot)
        return found
    if (args.text is None) != (args.questions is None):
        parser.error("give --text and --questions together, or neither")
    questions = QUESTIONS
    pages = sorted(GUIDES.glob("generate.md" if args.tiny else "*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    if args.tiny:
        questions = {question: section for question, section in QUESTIONS.items() if section in text}
    if args.text is not None:
        text = args.text.read_text(encoding="utf-8")
        questions = {one["question"]: one["section"] for one in json.loads(args.questions.read_text(encoding="utf-8"))}
    with tempfile.TemporaryDirectory() as scratch:
        if args.tiny:
            tiny.write(Path(scratch))
        folder = str(Path(scratch) / "my-bert") if args.tiny else args.model or str(checkpoint("minilm"))
        found = measure(folder, text, args.header, questions)
    found = {
        "environment": environment(torch.device("cpu")),
        "model": "tiny" if args.tiny else Path(folder).name,
        **found,
    }
    print(f"{found['tokens']:,} tokens, {found['sections']} sections, {found['questions']} questions")
    for name, one in found["ways"].items():
        print(f"  {name}: first {one['first']:.0%}, mean of 1 / rank {one['mean_1_by_rank']:.2f}")
    return keep(found, args, plot)


def plot(found: dict, path: Path) -> None:
    """Bars of what each way finds, the best on top."""
    title = f"{found['model']}: {found['questions']} questions about {found['sections']} sections, {found['tokens']:,} tokens"
    figure, (axis,) = canvas(1, title)
    ways = sorted(found["ways"].items(), key=lambda one: one[1]["mean_1_by_rank"])
    for shift, key, label in ((0.2, "first", "right section first"), (-0.2, "mean_1_by_rank", "mean of 1 / rank")):
        bars = axis.barh([i + shift for i in range(len(ways))], [way[key] for _, way in ways], 0.38, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_yticks(range(len(ways)), [textwrap.fill(name, 24) for name, _ in ways], fontsize=8)
    axis.set_xlim(0, 1)
    axis.legend(fontsize=8, loc="lower right")
    save(figure, path)


if __name__ == "__main__":
    main()
