"""When `generate` gives which token, and what stops it."""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

# tokens behind the first in which a compiled step is compiled and recorded, or met anew
SETTLING = 4


class Clock(BaseStreamer):
    """A streamer that notes when the prompt was taken, and when tokens were given: one, or those that a draft had right.

    `generate` hands tokens over on the host, so that a GPU has computed what a time stands for.

    Attributes:
        times: of the prompt, and of each time that tokens came.
        counts: how many tokens of a row came then, 0 with the prompt.
    """

    def __init__(self):
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: Tensor) -> None:
        # tokens of a draft come as `[1, n]`, one of each row as `[B]`
        self.counts.append((value.shape[-1] if value.ndim == 2 else 1) if self.times else 0)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def tokens(self) -> int:
        """New tokens so far."""
        return sum(self.counts)


class Stop(StoppingCriteria):
    """Stop behind a number of new tokens, or at the first token past the budget; the cache is made for all that were asked."""

    def __init__(self, clock: Clock, tokens: int, budget_s: float):
        self.clock, self.tokens, self.budget_s = clock, tokens, budget_s
        self.answers: dict[bool, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        # the clock has the prompt's time and those of all tokens but this one
        is_over = self.clock.tokens + 1 >= self.tokens or time.perf_counter() - self.clock.times[0] > self.budget_s
        if is_over not in self.answers:
            self.answers[is_over] = torch.full((len(input_ids),), is_over, device=input_ids.device)
        return self.answers[is_over]


@dataclass(frozen=True)
class Times:
    """Seconds of one call of `generate`.

    Attributes:
        prefill_s: from the prompt to the first token.
        token_s: median of the gaps between tokens, once they have settled; None if there are none. Where tokens come several at a
            time, the mean.
        settling_s: what the first gaps took beyond `token_s` each.
        slowest_s: the longest of the gaps that count.
        tokens: new tokens.
        tokens_a_pass: how many came at a time, at the mean.
    """

    prefill_s: float
    token_s: float | None
    settling_s: float | None
    slowest_s: float | None
    tokens: int
    tokens_a_pass: float = 1.0


def read_times(clock: Clock) -> Times:
    """The figures of a call that ended."""
    times, counts = clock.times, clock.counts[2:]
    gaps = [after - before for before, after in zip(times[1:], times[2:], strict=False)]
    counted, first = gaps[SETTLING:], gaps[:SETTLING]
    if not counted:
        return Times(times[1] - times[0], None, None, None, clock.tokens)
    came = sum(counts[SETTLING:])
    a_pass = came / len(counted)
    token_s = statistics.median(counted) if a_pass == 1 else sum(counted) / came
    settling_s = sum(first) - sum(counts[:SETTLING]) * token_s
    return Times(times[1] - times[0], token_s, settling_s, max(counted), clock.tokens, a_pass)


class OvertimeError(Exception):
    """Something took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OvertimeError` in what runs longer, as soon as Python has its turn; only in the main thread, and not on Windows."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise OvertimeError(f"stopped after {seconds:,.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
