"""The patterns of the literature, by the names of their papers. Units are converted here, once."""

from __future__ import annotations

from .base import Pattern
from .explicit import RandomBlocks
from .primitives import Chunk, First, Fixed, Last, Stride, Window, causal


def longformer(attention_window: int = 512, num_global: int = 1, dilation: int = 1) -> Pattern:
    """Longformer (arXiv:2004.05150, section 3.1): a window, dilated if asked, and global tokens at the start.

    `attention_window` is the total width, so each side is half of it; a dilated window reaches `dilation` times as far.
    """
    side = attention_window // 2 * dilation
    window = Window(side, side) if dilation == 1 else Window(side, side) & Stride(dilation)
    return window | First(num_global)


def bigbird(block_size: int = 64, num_random_blocks: int = 3, num_global_blocks: int = 1, seed: int = 0) -> Pattern:
    """BigBird, ITC (arXiv:2007.14062, section 2): three blocks of window, global blocks at both ends, random blocks.

    All is aligned to blocks, as in the paper: the window is the query's block and one on each side. The last blocks are
    the sequence's own, whatever its length; a causal model has none.
    """
    ends = First(num_global_blocks * block_size) | Last(num_global_blocks, block_size)
    return Chunk(block_size, 1, 1) | ends | RandomBlocks(num_random_blocks, block_size, seed)


def sparse_transformer(stride: int = 128, mode: str = "strided", summary: int = 8) -> Pattern:
    """Sparse Transformer (arXiv:1904.10509, section 4.2), causal: "strided" or "fixed".

    Strided: the last `stride` positions, and every `stride`-th before. Fixed: the query's block of `stride` positions, and
    the last `summary` of each earlier block. Both reach every earlier token in two layers.
    """
    kinds = {"strided": Window(stride, 0) | Stride(stride), "fixed": Fixed(stride, min(summary, stride))}
    if mode not in kinds:
        raise ValueError(f"sparse_transformer: mode is {mode!r}; it must be 'strided' or 'fixed'")
    return kinds[mode] & causal()


def sliding_window(size: int) -> Pattern:
    """Mistral (arXiv:2310.06825): `size` keys, the query's own included, so `size - 1` before it."""
    return Window(size - 1, 0)


def streaming(window: int = 1024, sinks: int = 4) -> Pattern:
    """StreamingLLM (arXiv:2309.17453): the last `window` keys, the query's own included, and the first `sinks`."""
    return Window(window - 1, 0) | First(sinks) & causal()


RECIPES = {recipe.__name__: recipe for recipe in (longformer, bigbird, sparse_transformer, sliding_window, streaming)}
