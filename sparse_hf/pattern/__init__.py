"""Patterns: what may attend to what. Frozen values that join with `|` and `&` and read and write as text."""

from . import recipes
from .base import EMPTY, FULL, PARTIAL, Pattern
from .blocks import BlockTable, RandomBlocks
from .chosen import Threshold, TopK, TopKBlocks, VerticalSlash
from .complement import Outside
from .grid import Window2d
from .lsh import LSH, LSHChunks
from .parse import PatternError
from .per_head import PerHead
from .primitives import (
    Chunk,
    First,
    Fixed,
    Last,
    Marked,
    MarkedKeys,
    MarkedQueries,
    Stride,
    Summary,
    Window,
    causal,
    full,
)
from .ring import Ring

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "BlockTable",
    "Chunk",
    "First",
    "Fixed",
    "LSH",
    "LSHChunks",
    "Last",
    "Marked",
    "MarkedKeys",
    "MarkedQueries",
    "Outside",
    "Pattern",
    "PatternError",
    "PerHead",
    "RandomBlocks",
    "Ring",
    "Stride",
    "Summary",
    "Threshold",
    "TopK",
    "TopKBlocks",
    "VerticalSlash",
    "Window",
    "Window2d",
    "causal",
    "full",
    "recipes",
]
