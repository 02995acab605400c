"""Can strides say the next pixel as well as dense attention? Bits per pixel of photographs.

A Sparse Transformer (arXiv:1904.10509, section 5.5) reads squares of two photographs, row after row, one
pixel of 256 greys a token. `sparse_transformer(stride=side)` sees the last row and the pixels above.
Beside it stand the same model with dense attention, with as wide a window and no stride, and with a
window of as many pairs, all trained alike from the same weights. The right quarter of each photograph
is held out. PNG says how many bits a coder without a model takes.

    python examples/model_pixels.py --out pixels.json --plot pixels.png                         # minutes on a CPU
    python examples/model_pixels.py --side 64 --steps 1500 --batch 8 --layers 8 --width 256     # minutes on a GPU
    python examples/model_pixels.py --tiny                                                      # seconds

The photographs are scikit-learn's.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples.studies import DEVICE, PRECISION, canvas, keep, save
from sparse_hf.bench import environment

# greys, and the token that stands before the first pixel
GREYS, START = 256, 256
# how much of a photograph's width is learned from
LEARNED = 0.75


def photographs() -> list[Tensor]:
    """Grey photographs `[height, width]`, 0 to 255."""
    return [torch.from_numpy(np.rint(image.mean(-1)).astype(np.int64)) for image in load_sample_images().images]


def squares(images: list[Tensor], side: int) -> tuple[list[Tensor], Tensor]:
    """The left of each photograph, and squares `[n, side, side]` that tile the right of all."""
    left, right = [], []
    for image in images:
        cut = int(image.shape[1] * LEARNED)
        left.append(image[:, :cut])
        tiles = image[:, cut:].unfold(0, side, side).unfold(1, side, side)
        right.append(tiles.reshape(-1, side, side))
    return left, torch.cat(right)


def drawn(left: list[Tensor], side: int, count: int, draw: torch.Generator) -> Tensor:
    """Squares `[count, side, side]` from anywhere in what is learned from."""
    found = []
    for which in torch.randint(len(left), (count,), generator=draw).tolist():
        height, width = left[which].shape
        row = int(torch.randint(height - side + 1, (1,), generator=draw))
        column = int(torch.randint(width - side + 1, (1,), generator=draw))
        found.append(left[which][row : row + side, column : column + side])
    return torch.stack(found)


def bits(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Bits `[n, side * side]` that each pixel of squares `[n, side, side]` takes behind those before it."""
    wanted = pixels.flatten(1).to(DEVICE)
    ids = torch.cat([torch.full_like(wanted[:, :1], START), wanted[:, :-1]], 1)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
        logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none") / math.log(2)


def train(model: PreTrainedModel, left: list[Tensor], args: argparse.Namespace) -> list[float]:
    """Bits per pixel of every step. All models see the same squares."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps, pct_start=0.1)
    found = []
    model.train()
    for _ in range(args.steps):
        loss = bits(model, drawn(left, args.side, args.batch, draw)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@torch.inference_mode()
def held_out(model: PreTrainedModel, right: Tensor, batch: int) -> Tensor:
    """Mean bits of each pixel `[side * side]` of the held-out squares."""
    model.eval()
    return torch.cat([bits(model, part).cpu() for part in right.split(batch)]).mean(0)


def png_bits(right: Tensor) -> float:
    """Bits per pixel of the held-out squares as PNG files, each of its own, without PNG's frame of 57 bytes."""
    from PIL import Image

    total = 0
    for square in right:
        file = io.BytesIO()
        Image.fromarray(square.numpy().astype(np.uint8)).save(file, "PNG", optimize=True)
        total += 8 * (len(file.getvalue()) - 57)
    return total / right.numel()


def ways(side: int) -> dict[str, str | None]:
    """Patterns by name. A query of the stride sees at most `side` pixels before it and `side` above."""
    return {
        "dense": None,
        "sparse_transformer": f"sparse_transformer(stride={side})",
        "window of a row": f"window({side}, 0)",
        # a square has `side` rows, so that the mean number of pixels above is half of them
        "window of as many pairs": f"window({side + side // 2}, 0)",
    }


def fresh(args: argparse.Namespace) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=GREYS + 1, n_positions=args.side**2, n_embd=args.width, n_layer=args.layers, n_head=args.width // 32,
        bos_token_id=START, eos_token_id=START, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(DEVICE)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="Pixels of a square's side; a text has side * side.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="The highest learning rate.")
    parser.add_argument("--tiny", action="store_true", help="Squares of 8 pixels, two layers, three steps.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    if args.tiny:
        args.side, args.steps, args.batch, args.layers, args.width = 8, 3, 2, 2, 32
    logging.set_verbosity_error()
    left, right = squares(photographs(), args.side)
    if args.tiny:
        right = right[::400]
    settings = {name: getattr(args, name) for name in ("side", "steps", "batch", "layers", "width", "rate")}
    settings["precision"] = PRECISION if DEVICE.type == "cuda" else "float32"
    found = {"environment": environment(DEVICE), "settings": settings, "held_out": len(right), "png": png_bits(right)}
    found["ways"] = {}
    print(f"PNG: {found['png']:.3f}")
    for name, pattern in ways(args.side).items():
        dense = fresh(args)
        model = dense if pattern is None else sparse_hf.sparsify(dense, pattern)
        learned = train(model, left, args)
        by_pixel = held_out(model, right, args.batch).double()
        rows = by_pixel.reshape(args.side, args.side).mean(1).tolist()
        found["ways"][name] = {"pattern": pattern, "bits": float(by_pixel.mean()), "by_row": rows, "learning": learned}
        print(f"{name}: {by_pixel.mean():.3f} bits per pixel", flush=True)
        # after each, so that an interrupt loses little
        keep(found, args, plot)
    return found


def plot(found: dict, path: Path) -> None:
    """What is learned with every step, and the bits of a pixel by its row."""
    settings = found["settings"]
    side, steps = settings["side"], settings["steps"]
    figure, (left, right) = canvas(
        2, f"Photographs in squares of {side} x {side} pixels, {steps} steps of {settings['batch']}"
    )
    every = max(1, steps // 50)
    for name, way in found["ways"].items():
        means = [sum(way["learning"][at : at + every]) / every for at in range(0, steps - every + 1, every)]
        left.plot([every * (i + 1) for i in range(len(means))], means, label=name)
        right.plot(range(side), way["by_row"], label=f"{name} ({way['bits']:.2f})")
    right.axhline(found["png"], color="grey", linestyle=":", label=f"PNG ({found['png']:.2f})")
    left.set(xlabel="step", ylabel="bits per pixel, learned from")
    right.set(xlabel="row of the square", ylabel="bits per pixel, held out")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
