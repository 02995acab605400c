"""What runs a call: the ladder that "auto" goes down, and backends by name.

`route` reads top to bottom as what "auto" does. It decides before it plans: a backend that needs no plan makes none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..pattern import LSH, Pattern, Threshold
from ..pattern.forms import read_content
from ..plan import find_strided_plan
from .backend import AttentionCall, Backend
from .backends.blockwise.backend import Blockwise
from .backends.flash.backend import Flash
from .backends.flash.window_kernels import forced_kernels
from .backends.flex import Flex
from .backends.reference import Reference
from .backends.sdpa.decode import MAX_QUERIES, Decode
from .backends.sdpa.dense import Dense
from .backends.sdpa.window import SlidingWindow
from .backends.triton.backend import Triton
from .composite.chosen import kind_of_choice
from .composite.content import (
    ContentPairs,
    ContentPlan,
    DenseContentPairs,
    Kind,
    dense_weights,
    planned,
    positions_plan,
)
from .composite.global_tokens import GlobalTokens
from .composite.lsh import HASHES
from .composite.strided import Strided

logger = logging.getLogger(__name__)

# those that a user may ask for by name
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Reference(), Blockwise(), Flex(), Flash(), Triton())
}  # fmt: skip
# what "auto" tries for a plan in blocks, in this order; of fewer queries than MAX_QUERIES a GPU would wait for the host
FOR_BLOCKS, FOR_FEW_BLOCKS = ("fa", "triton", "flex", "blockwise"), ("blockwise",)
DENSE, DECODE, SLIDING = Dense(), Decode(), SlidingWindow()


def route(call: AttentionCall, name: str) -> Backend:
    """The backend that runs a call. Only "auto" may choose, and it says what it chose, once.

    Decisions are remembered for as long as the batch lives: layers of one forward pass ask the same.

    Raises:
        NotImplementedError: a backend that was asked for by name cannot run here; the message says why.
    """
    key = _key(call, name)
    known = call.batch.memo.get(key) if call.chosen_plan is None else None
    if known is not None:
        backend, call.chosen_plan = known
        return backend
    is_ours = call.chosen_plan is None
    backend = _decided(call, name)
    if is_ours:
        # what depends on queries and keys themselves is planned anew in every call
        plan = None if isinstance(backend, ContentPairs) else call.chosen_plan
        call.batch.remember(key, (backend, plan))
    return backend


def _decided(call: AttentionCall, name: str) -> Backend:
    """The ladder."""
    if name == "auto":
        # 1. nothing is left out of a text this short: dense attention
        if DENSE.is_fastest(call) and DENSE.why_not(call) is None:
            return _said(DENSE, call, "by a pattern that leaves out no pair of a text this short", "")
        # 2. a few queries, as in decoding: slices of the keys that they see
        if DECODE.why_not(call) is None and DECODE.is_fastest(call):
            return _said(DECODE, call, f"of fewer than {MAX_QUERIES} queries", " over the keys that they see")
        # 3. a window over a text that its host takes longer for than a GPU
        if SLIDING.is_fastest(call) and SLIDING.why_not(call) is None:
            return _said(SLIDING, call, "by a window over a short text", " with a window")
    # 4. pairs that are chosen by content: positions on a backend of their own, and theirs beside it
    if isinstance(call.pattern, Pattern) and call.pattern.uses_content:
        return _for_content(call, name)
    # 5. marks that only kernels look at, so that a CUDA graph may record the call
    if name == "auto" and call.recorded:
        recorded = GlobalTokens(partial(_for_blocks, name))
        if recorded.why_not(call) is None:
            return recorded
    # 6. strides, regrouped so that they are windows, on a backend for each of their plans
    if name != "reference" and call.chosen_plan is None:
        strided = Strided(partial(_for_blocks, name, regrouped=True))
        if strided.why_not(call) is None and (plan := find_strided_plan(call.plan_key, call.batch)) is not None:
            call.chosen_plan = plan
            return strided
    # 7. blocks
    return _for_blocks(name, call)


def _for_blocks(name: str, call: AttentionCall, regrouped: bool = False) -> Backend:
    """The backend of a call whose plan is one of blocks."""
    if name != "auto":
        reason = BACKENDS[name].why_not(call)
        if reason:
            raise NotImplementedError(f"backend {name!r} cannot run this call: {reason}")
        # asked for here, so that it is remembered with the decision
        _ = call.plan
        return BACKENDS[name]
    # whether it is worth it is asked first, since it may take tables to say whether it can
    found = next(b for b in _candidates(call, regrouped) if b.is_fastest(call) and b.why_not(call) is None)
    _ = call.plan
    _say(found.name, call.q.device.type, str(call.q.dtype), bool(call.dropout), regrouped)
    return found


def _candidates(call: AttentionCall, regrouped: bool) -> Iterator[Backend]:
    # regrouped texts may be short, but there are many of them; and a CUDA graph holds kernels, and none of the steps by
    # which `blockwise` walks a few queries
    many = call.q.shape[2] >= MAX_QUERIES or regrouped or (call.recorded and call.q.is_cuda)
    return (BACKENDS[name] for name in (FOR_BLOCKS if many else FOR_FEW_BLOCKS))


def _for_content(call: AttentionCall, name: str) -> Backend:
    kind = kind_of(call)
    if name not in kind.backends:
        raise NotImplementedError(
            f"backend {name!r} cannot run {kind.name}(...), whose pairs are known at run time only; "
            f"{', '.join(map(repr, kind.backends))} can"
        )
    if name == "auto" and kind.in_tiles:
        name = "blockwise" if BACKENDS["triton"].why_not(call) else "triton"
    pick = partial(_for_blocks, name)
    backend = DenseContentPairs(kind, pick) if name == "reference" and call.q.numel() else ContentPairs(kind, pick)
    reason = backend.why_not(call)
    if reason:
        raise NotImplementedError(reason)
    if name not in ("auto", "reference"):
        # says why the backend cannot, if it cannot
        pick(call.part(call.q, call.k, call.v, positions_plan(call)))
    return backend


def kind_of(call: AttentionCall) -> Kind:
    """How a call's pattern chooses pairs by content.

    Raises:
        ValueError: a pattern that chooses in ways that do not go together.
    """
    assert call.pattern is not None
    chosen = read_content(call.pattern).chosen
    # a pattern chooses in one way
    ways = {type(content) if isinstance(content, (LSH, Threshold)) else None for content, _ in chosen}
    if len(ways) > 1:
        words = " and ".join(dict.fromkeys(f"{content.word}(...)" for content, _ in chosen))
        raise ValueError(f"{call.pattern} has both {words}; use one of them")
    return HASHES if LSH in ways else kind_of_choice(chosen)


def content_plan(call: AttentionCall) -> ContentPlan:
    """The plan of a call whose pattern chooses pairs by content, which the call goes on with."""
    return planned(call, kind_of(call))


def content_weights(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse and the weights `[B, H, Q, K]` of a pattern that chooses pairs by content. O(n^2)."""
    return dense_weights(call, kind_of(call))


def _key(call: AttentionCall, name: str) -> tuple:
    """All that a decision depends on beside the batch."""
    q, k, v = call.q, call.k, call.v
    how = call.scoring.softcap is None, call.scoring.bias is None, call.dropout.p > 0, call.wants_lse, call.recorded
    process = torch.are_deterministic_algorithms_enabled(), forced_kernels()
    return (
        name,
        call.pattern,
        call.q_offset,
        q.shape,
        k.shape,
        v.shape[-1],
        q.dtype,
        q.device,
        call.trains,
        how,
        process,
    )


def _said(backend: Backend, call: AttentionCall, which: str, over: str) -> Backend:
    _say_torch(which, over, call.q.device.type, call.q.dtype)
    return backend


@lru_cache
def _say(name: str, device: str, dtype: str, dropout: bool, regrouped: bool) -> None:
    how = " with dropout" * dropout + ", tokens of a stride side by side," * regrouped
    logger.info("attention on %s in %s%s runs on backend %r", device, dtype, how, name)


@lru_cache
def _say_torch(which: str, over: str, device: str, dtype: torch.dtype) -> None:
    what = "PyTorch's scaled_dot_product_attention"
    logger.info("attention %s on %s in %s runs on %s%s", which, device, dtype, what, over)
