"""Rows of tensors that go from process to process, forwards, and their gradients, backwards.

Legend: C numbers of a row, S ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.autograd import refuse_second_derivative


@dataclass(eq=False)
class Ranks:
    """The processes that hold one text, and what this one has sent to others.

    Attributes:
        group: of torch.distributed; None is that of all processes.
        bytes_sent: bytes that this process has sent to others, gradients included.
    """

    group: Any = None
    bytes_sent: int = 0
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "a text is split over processes, and there is no process group; launch with torchrun or accelerate, or call "
                "torch.distributed.init_process_group"
            )
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is not in the group that shares the text; give it the group that it is in")

    def swap(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows of all ranks for this one, `[sum(received), C]`, differentiable; each rank calls it.

        Args:
            rows: `[sum(sent), C]`, those for rank 0 first.
            sent, received: rows for each rank, and from each.
        """
        return _Swap.apply(rows, self, sent, received)

    def swap_values(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """`swap` without a gradient."""
        rows = rows.contiguous()
        out = rows.new_empty(sum(received), *rows.shape[1:])
        self.bytes_sent += (len(rows) - sent[self.rank]) * rows[:1].numel() * rows.element_size()
        with self._told():
            dist.all_to_all_single(out, rows, received, sent, group=self.group)
        return out

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what a process waited for that others have left.

        Raises:
            RuntimeError: another process has gone, or does not come within the timeout of the group.
        """
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of the {self.size} processes that share a text waited for the others, and one of them has ended or "
                "hangs; see what it said. How long a process waits is the timeout of its process group (init_process_group(timeout=...), "
                "TrainingArguments(ddp_timeout=60))"
            ) from error

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks of a number, whose gradient on each rank is that of its own `value`."""
        return _Mean.apply(value, self)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all ranks, without a gradient."""
        total = value.detach().clone()
        self.bytes_sent += total.numel() * total.element_size()
        with self._told():
            dist.all_reduce(total, group=self.group)
        return total

    def check_same(self, values: list[float], device: torch.device) -> None:
        """Raise ValueError where numbers are not those of the other ranks."""
        own = torch.tensor(values, dtype=torch.float64, device=device)
        # the greatest of all, and the least
        both = torch.cat((own, -own))
        self.bytes_sent += both.numel() * both.element_size()
        with self._told():
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        if not torch.equal(both[: len(own)], -both[len(own) :]):
            raise ValueError(
                "processes that share a text were given different ones; each of them takes the same whole batch, which it splits itself "
                "(with accelerate: ParallelismConfig(cp_size=...))"
            )


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, ranks: Ranks, sent: list[int], received: list[int]):
        ctx.ranks, ctx.sent, ctx.received = ranks, sent, received
        return ranks.swap_values(rows, sent, received)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivative("an exchange between processes")
        return ctx.ranks.swap_values(grad, ctx.received, ctx.sent), None, None, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, ranks: Ranks):
        return ranks.summed(value) / ranks.size

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


@dataclass(frozen=True, eq=False)
class Route:
    """Which tokens go where so that each rank gets those that it asks for.

    Attributes:
        picked: rows of the batch and tokens of this rank's part that others get, `[sum(sent)]` each, those for rank 0 first.
        sent, received: tokens for each rank, and from each.
        places: `[B, M]` int64, where each token asked for stands among the received; one behind them for none.
    """

    ranks: Ranks
    picked: tuple[Tensor, Tensor]
    sent: list[int]
    received: list[int]
    places: Tensor

    @staticmethod
    def of(ranks: Ranks, bounds: list[int], asked: list[Tensor]) -> Route:
        """The route by which ranks get tokens.

        Args:
            bounds: where each rank's part begins, and the end of the last.
            asked: of each rank, indices `[B, M]` in the text, -1 for none.
        """
        own, (begin, end) = asked[ranks.rank], bounds[ranks.rank : ranks.rank + 2]
        rows, tokens = [], []
        for index in asked:
            row, column = ((index >= begin) & (index < end)).nonzero(as_tuple=True)
            rows.append(row)
            tokens.append(index[row, column] - begin)
        places, received = torch.zeros_like(own), []
        for a, z in zip(bounds[:-1], bounds[1:], strict=True):
            found = ((own >= a) & (own < z)).flatten().nonzero().flatten()
            places.view(-1)[found] = torch.arange(len(found)) + sum(received)
            received.append(len(found))
        places = places.where(own >= 0, sum(received))
        return Route(ranks, (torch.cat(rows), torch.cat(tokens)), [len(t) for t in tokens], received, places)

    def to(self, device: torch.device) -> Route:
        row, token = self.picked
        return replace(self, picked=(row.to(device), token.to(device)), places=self.places.to(device))

    def fetch(self, *own: Tensor) -> list[Tensor]:
        """The tokens asked for, `[B, M, ...]` of each tensor, 0 for none; `own` are `[B, n, ...]` of one dtype."""
        rows = torch.cat([t[self.picked].flatten(1) for t in own], 1)
        got = torch.nn.functional.pad(self.ranks.swap(rows, self.sent, self.received), (0, 0, 0, 1))
        got = got.index_select(0, self.places.flatten())
        parts = got.split([t[0, 0].numel() for t in own], 1)
        return [part.view(*self.places.shape, *t.shape[2:]) for part, t in zip(parts, own, strict=True)]
