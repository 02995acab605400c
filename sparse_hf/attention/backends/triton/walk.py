"""Attention calls of the Triton kernels over lists of tiles, prepared once for all that are alike.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; W places of all rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ....plan.tile_lists import Lists, TileLists
from ...dropout import NO_DROPOUT, Dropout, threshold
from ...launch import Launch, strides_of
from ...scoring import Scoring

IS_INSTALLED = find_spec("triton") is not None
# set by tests, which run the kernels in Triton's interpreter
DEVICES = {"cuda"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# head dims; products in float32 are unrolled, which takes minutes to compile for wider ones
MAX_HEAD_DIM, MAX_HEAD_DIM_FLOAT32 = 256, 128
# what a segment writes to, in tensors of each kernel
SEGMENT_TENSORS = {"forward": 2, "gradients_of_queries": 1, "gradients_of_keys": 2}
# kinds of calls that are prepared for lists; more are as good as none
MAX_PREPARED = 4096


def why_unfit(q: Tensor, v: Tensor, *, padded: bool = False) -> str | None:
    """Why the kernels cannot compute these tensors, or None.

    Args:
        padded: will the narrower of them get zeros, until both have one head dim?
    """
    widest = max(q.shape[-1], v.shape[-1])
    if q.device.type not in DEVICES:
        return f"it needs a GPU and q is on {q.device}"
    if not IS_INSTALLED:
        return "it needs the package triton, which torch brings for GPUs on Linux"
    if q.dtype not in DTYPES:
        return f"its kernels compute in 16 or 32 bits and q is {q.dtype}; use backend='blockwise'"
    if q.shape[-1] != v.shape[-1] and not padded or widest > MAX_HEAD_DIM:
        return f"head dims of q and v are {q.shape[-1]} and {v.shape[-1]}; they must be one number up to {MAX_HEAD_DIM}"
    if q.dtype == torch.float32 and widest > MAX_HEAD_DIM_FLOAT32:
        return (
            f"in float32 its kernels take head dims up to {MAX_HEAD_DIM_FLOAT32} and q or v has {widest}; use "
            "backend='blockwise'"
        )
    return None


@dataclass(frozen=True, eq=False)
class Step:
    """A launch of a kernel over lists, and the numbers that it is given before and after the dropout's seed."""

    launch: Launch
    before: tuple[float, ...]
    after: tuple[float, ...]

    def __call__(self, tensors: Sequence[Tensor], seed: int) -> None:
        self.launch(tensors, (*self.before, seed, *self.after))


@dataclass(frozen=True)
class Walk:
    """Calls of the kernels over the same lists, which write to the tensors that they are given.

    `index` `[B * H, W]` says which token stands at each place, of `rounds` rounds; None: places are tokens. Of several rounds
    results are written by place, `[B, H, W, D]`, and have no segments. `relation` says which tokens of another order may see
    each other.
    """

    tiles: TileLists
    scoring: Scoring
    index: Tensor | None = None
    rounds: int = 1
    relation: int = 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: Dropout = NO_DROPOUT
    ) -> None:  # fmt: skip
        """Write to `out` and `lse`."""
        lists = self.tiles.by_query
        segments = self._segments(lists, out, lse)
        key = "forward", dropout.p, q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, self._how
        step = self._known.get(key) or self._keep(
            key, self._step("forward", q, k, dropout.p, (*strides_of(q, k, v, out), lse.shape[2]))
        )
        step((q, k, v, out, lse, *segments), _seed(dropout))
        if lists.cut:
            self._join("merge_segments", lists, (*segments, lists.long, out, lse), (*strides_of(out), lse.shape[2]))

    def backward(
        self, inputs: Sequence[Tensor], results: Sequence[Tensor], given: tuple[Tensor, Tensor | None],
        grads: Sequence[Tensor], dropout: Dropout = NO_DROPOUT,
    ) -> None:  # fmt: skip
        """Write the gradients of q, k and v to `grads`.

        Args:
            inputs: q, k and v.
            results: out and lse.
            given: the gradients of these; of lse None is zero.
        """
        (q, k, v), (out, lse), (grad_out, grad_lse), (grad_q, *of_keys) = inputs, results, given, grads
        lse = lse.contiguous()
        # anything will do where it is not read
        given_lse = lse if grad_lse is None else grad_lse.contiguous()
        index, (by_query, by_key), seed = self.index, (self.tiles.by_query, self.tiles.by_key), _seed(dropout)
        delta = torch.empty_like(lse) if index is None else lse.new_empty(*lse.shape[:2], index.shape[1])
        key = (
            "backward", grad_lse is None, dropout.p, q.shape, k.shape, q.stride(), k.stride(), v.stride(), out.stride(),
            grad_out.stride(), *[grad.stride() for grad in grads], q.dtype, self._how,
        )  # fmt: skip
        steps = self._known.get(key)
        if steps is None:
            sizes, is_asked = (lse.shape[2], delta.shape[2]), grad_lse is not None
            of_queries, of_both = strides_of(grad_out, q, k, v, out, grad_q), strides_of(grad_out, q, k, v, *of_keys)
            steps = self._keep(key, (
                self._step("gradients_of_queries", q, k, dropout.p, (*of_queries, *sizes), HAS_GRAD_LSE=is_asked),
                self._step("gradients_of_keys", q, k, dropout.p, (*of_both, *sizes)),
            ))  # fmt: skip

        segments = self._segments(by_query, grad_q)
        steps[0]((grad_out, q, k, v, out, lse, given_lse, delta, grad_q, *segments), seed)
        self._add(segments, by_query, (grad_q,))

        segments = self._segments(by_key, *of_keys)
        steps[1]((grad_out, q, k, v, lse, delta, *of_keys, *segments), seed)
        self._add(segments, by_key, of_keys)

    @cached_property
    def _how(self) -> tuple:
        return self.scoring.scale, self.scoring.softcap, self.relation, self.rounds, self.index is None

    @cached_property
    def _known(self) -> dict[tuple, Any]:
        """What was prepared for calls over these lists, which walks of other scores share."""
        return self.tiles.__dict__.setdefault("_prepared", {})

    def _keep(self, key: tuple, prepared: Any) -> Any:
        """`prepared`, found again for calls that are alike."""
        if len(self._known) >= MAX_PREPARED:
            self._known.clear()
        self._known[key] = prepared
        return prepared

    def _step(
        self, name: str, q: Tensor, k: Tensor, dropout: float, strides: tuple[int, ...], **flags: bool
    ) -> Step:  # fmt: skip
        """The launch of a kernel that walks lists: those of the queries, or of the keys."""
        from . import kernels

        of_keys = name == "gradients_of_keys"
        lists, heads = (self.tiles.by_key, k) if of_keys else (self.tiles.by_query, q)
        masks = self.tiles.masks_by_key if of_keys else self.tiles.masks
        of_lists = lists.offsets, lists.masked, lists.others, lists.masks
        # without segments none are written, and where places are tokens no index is read: anything will do
        unread = 0 if self.index is not None else 2 if lists.cut else 2 + SEGMENT_TENSORS[name]
        fixed = *(self.tiles.group_of,) * unread, self.tiles.group_of, *of_lists, masks, lists.segments
        constants = {
            **flags, "H": q.shape[1], "R": q.shape[1] // k.shape[1], "CUT": lists.cut > 0, "INDEXED": self.index is not None,
            "BY_PLACE": self.rounds > 1, "RELATION": self.relation, "HAS_CAP": self.scoring.softcap is not None,
            "DROPOUT": dropout > 0, **self._shape(q), "PRECISION": "ieee",
        }  # fmt: skip
        grid, options = (lists.items, heads.shape[0] * heads.shape[1]), launch_options(q)[name != "forward"]
        width = 0 if self.index is None else self.index.shape[1]
        of_seed = _word(threshold(dropout)), 1 / (1 - dropout)
        sizes = lists.cut, lists.lines, lists.limit, width, width, lists.lines // self.rounds
        return Step(
            Launch(getattr(kernels, name), grid, fixed, strides, constants, **options),
            (self.scoring.scale, float(self.scoring.softcap or 1)),
            (*of_seed, q.shape[2], k.shape[2], *sizes),
        )

    def _join(self, name: str, lists: Lists, tensors: Sequence[Tensor], strides: tuple, **flags: bool) -> None:
        """Run a kernel that adds what segments found to results `[B, heads, length, D]`, the fourth of `tensors`."""
        total = tensors[3]
        batch, heads, length, _ = total.shape

        key = name, len(lists.long), strides, total.shape, total.dtype, *flags.values()
        join = self._known.get(key)
        if join is None:
            from . import kernels

            constants = {"H": heads, **flags, **self._shape(total)}
            grid = len(lists.long), batch * heads
            join = self._keep(key, Launch(getattr(kernels, name), grid, (), strides, constants))
        join(tensors, (length,))

    def _shape(self, q: Tensor) -> dict[str, int]:
        """The sides of what the kernels hold; the matrix units take powers of two from 16."""
        return {"S": self.tiles.size, "D": q.shape[3], "BD": max(16, 1 << (q.shape[3] - 1).bit_length())}

    def _segments(self, lists: Lists, *results: Tensor) -> list[Tensor]:
        """What the segments find of each of `results` `[B, heads, length, ...]`, in float32, and the index of places, if any."""
        if self.index is not None:
            # the index stands behind segments, of which a walk of another order has none: anything will do
            assert not lists.cut
            return [self.index] * (len(results) + 2)
        if not lists.cut:
            return []
        return [
            t.new_empty((lists.cut, t.shape[0] * t.shape[1], self.tiles.size, *t.shape[3:]), dtype=torch.float32)
            for t in results
        ]

    def _add(self, segments: Sequence[Tensor], lists: Lists, grads: Sequence[Tensor]) -> None:
        """Add what segments found to one or two gradients `[B, heads, length, D]`."""
        if lists.cut:
            # of a single one both are the same, and the second is left alone
            tensors = segments[0], segments[-1], lists.long, grads[0], grads[-1]
            self._join("add_segments", lists, tensors, strides_of(grads[0], grads[-1]), TWO=len(grads) > 1)


def _seed(dropout: Dropout) -> int:
    return 0 if dropout.seed is None else _word(int(dropout.seed))


def _word(number: int) -> int:
    """The same 32 bits with a sign, so that all seeds are of one type."""
    return number - (1 << 32) if number >= 1 << 31 else number


def launch_options(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Warps and stages of the forward and of the backward kernels."""
    # measured on an H200; more stages than these do not fit its shared memory
    size = q.shape[3] * q.element_size()
    stages = (3, 3) if size <= 128 else (3, 2) if size <= 256 else (2, 1)
    return {"num_warps": 4, "num_stages": stages[0]}, {"num_warps": 4, "num_stages": stages[1]}
