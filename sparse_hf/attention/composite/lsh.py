"""Attention by patterns with `lsh(...)`: what positions say on any backend, what hashes add in hash order, merged exactly.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...pattern.forms import read_hashes
from ...plan import BlockPlan, cached_plan
from ...plan.lsh import Held, hashed_plan
from ..autograd import part_gradients
from ..backends import reference
from ..hashed import hash_order as hashed
from ..merge import merge
from ..scoring import Scoring

BACKENDS = ("auto", "blockwise", "reference")


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def uses_content(text: str) -> bool:
    """Does a pattern choose pairs from queries and keys?"""
    return bool(read_hashes(text)[1])


@dataclass(frozen=True)
class _Dense:
    """A mask in the place of a plan: what the reference asks of one."""

    mask: Tensor  # [B, H, Q, K] bool
    q_offset: int

    @property
    def heads(self) -> range:
        return range(self.mask.shape[1])

    @property
    def q_len(self) -> int:
        return self.mask.shape[2]

    @property
    def kv_len(self) -> int:
        return self.mask.shape[3]

    def to_dense(self) -> Tensor:
        return self.mask


def attend(
    q, k, v, text: str, q_offset: int, batch: tuple, scoring: Scoring, dropout: float, backend: str, seed, choose
):
    """Out `[B, H, Q, D]` and lse `[B, H, Q]`, differentiable.

    Raises:
        NotImplementedError: a backend that cannot compute in hash order, or scores that it cannot change.
    """
    if backend not in BACKENDS:
        raise NotImplementedError(
            f"backend {backend!r} cannot run lsh(...), whose pairs are known at run time only; 'auto', 'blockwise' and "
            "'reference' can"
        )
    if backend == "reference":
        return look(q, k, v, text, q_offset, batch, scoring, dropout, seed)[:2]
    plan, hashes = _split(q, k, text, q_offset, batch, scoring)
    parts = [choose(backend, q, v, plan, scoring, dropout).attend(q, k, v, plan, scoring, dropout, seed)]
    chosen, _ = hashed_plan(q, k, hashes, plan)
    parts.append(hashed.attend(q, k, v, chosen, scoring.scale, dropout, seed))
    return merge(parts)


def backward(
    q, k, v, out, lse, grad_out, grad_lse, text: str, q_offset: int, batch: tuple, scoring: Scoring, dropout: float, backend: str,
    seed, choose,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k and v inside an operator, where autograd records nothing.

    Each part is handed the merged out and lse, so that what it gives are its shares.
    """
    plan, hashes = _split(q, k, text, q_offset, batch, scoring)
    rest = out, lse, grad_out, grad_lse
    chosen, holds = hashed_plan(q, k, hashes, plan)
    if backend == "reference":
        return part_gradients(reference, [q, k, v], *rest, _dense(q, k, plan, holds, q_offset), scoring, dropout, seed)
    module = choose(backend, q, v, plan, scoring, dropout)
    one = part_gradients(module, [q, k, v], *rest, plan, scoring, dropout, seed)
    other = hashed.backward(q, k, v, *rest, chosen, scoring.scale, dropout, seed)
    return tuple(a + b for a, b in zip(one, other, strict=False))


def look(q, k, v, text: str, q_offset: int, batch: tuple, scoring: Scoring, dropout: float, seed):
    """The specification: out, lse and the weights `[B, H, Q, K]`, from one dense mask. O(n^2)."""
    plan, hashes = _split(q, k, text, q_offset, batch, scoring)
    _, holds = hashed_plan(q, k, hashes, plan)
    return reference.look(q, k, v, _dense(q, k, plan, holds, q_offset), scoring, dropout, seed)


def _dense(q: Tensor, k: Tensor, plan: BlockPlan, holds: Held, q_offset: int) -> _Dense:
    x = torch.arange(q.shape[0] * q.shape[1], device=q.device)[:, None, None]
    queries, keys = (torch.arange(t.shape[2], device=q.device) for t in (q, k))
    mask = holds(x, queries[:, None], keys).view(*q.shape[:3], k.shape[2])
    return _Dense(mask | plan.to_dense(), q_offset)


def _split(q, k, text: str, q_offset: int, batch: tuple, scoring: Scoring):
    """The plan of what positions say, and the hashes."""
    changed = {"softcap": scoring.softcap, "relative_bias": scoring.bias}
    for name, value in changed.items():
        if value is not None:
            raise NotImplementedError(f"lsh(...) does not go with {name}; use patterns of positions in such models")
    plain, hashes = read_hashes(text)
    return cached_plan(plain, q.shape[2], k.shape[2], q_offset, batch, q.device), hashes
