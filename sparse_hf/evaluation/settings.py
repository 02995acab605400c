"""What an evaluation reads: how much of each text, and which lengths and depths are asked about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16"]
# a text of fewer tokens says nothing of a pattern
SHORTEST = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much an evaluation reads.

    Args:
        length: tokens of each sample; a text that has fewer is refused.
        samples: samples per text, evenly spaced in it.
        lengths: tokens of the texts of `recall` and `cost`; by default a quarter, half and all of `length`.
        depths: where in a text a fact stands that `recall` asks for, 0 at its beginning and 1 at its end.
        repeats: questions of `recall` for each task, length and depth.
        tasks: tasks of `recall`, or groups of them: "short", "ruler"; by default the short ones, and those of `questions`.
        questions: files of questions about documents, in the format of SQuAD or HotpotQA.
        harness: files of tasks in the format of lm-evaluation-harness, which the probe `harness` asks through it.
        held_out: files that `tune` checks its choice on; by default the texts that it chose by.
        batch: questions that are asked together; more of them are faster on a GPU, and take memory.
            Models with a table of positions are asked one by one.
        dtype: of the weights of folders; by default the folder's own on a GPU, and float32 on a CPU.
        global_token_ids: token ids that `marked()` speaks of wherever they occur.
        seed: of whatever is drawn.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: a value outside what is possible.

    Example:
        >>> Settings(length=1024, depths=(0.5,)).all_lengths
        (256, 512, 1024)
    """

    length: int = 2048
    samples: int = 1
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    repeats: int = 1
    tasks: tuple[str, ...] = ()
    questions: tuple[Path, ...] = ()
    harness: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    batch: int = 1
    dtype: Dtype | None = None
    global_token_ids: tuple[int, ...] = ()
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        for name, least in (("length", SHORTEST), ("samples", 1), ("repeats", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(get_args(Dtype))}")
        short = [length for length in self.lengths if length < SHORTEST]
        if short:
            raise ValueError(f"lengths has {short[0]}; the shortest text that is asked about has {SHORTEST} tokens")
        outside = [depth for depth in self.depths if not 0 <= depth <= 1]
        if outside or not self.depths:
            raise ValueError(
                f"depths is {self.depths}; give shares of a text between 0 (its beginning) and 1 (its end)"
            )

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """The lengths of `recall` and `cost`, ascending."""
        chosen = self.lengths or (self.length // 4, self.length // 2, self.length)
        return tuple(sorted({length for length in chosen if length >= SHORTEST}))
