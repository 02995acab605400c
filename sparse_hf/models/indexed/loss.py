"""What an indexer learns from: how far its scores are from what attention to all keys would weigh (arXiv:2512.02556, 2.1).

The distribution of a query over its keys is the mean over the heads of the dense attention weights; the loss is its
Kullback-Leibler divergence from the softmax of the indexer's scores. It is computed some queries at a time, with its gradients, so
that nothing of two lengths is kept, and nothing is computed twice.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; a piece has m queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.autograd import refuse_second_derivative
from ...attention.backend import AttentionCall
from ...attention.chosen import IndexerScores, Limits
from ...attention.composite.chosen_rest import find_rest
from ...attention.composite.content import positions_plan
from ...pattern.base import whole
from ...pattern.forms import EVERYTHING, read_content
from ...plan import BlockPlan
from ..hf.chosen_keys import LEARNING, Learning
from ..hf.indexer import Indexer
from .dsa import DsaIndexer

# numbers of a piece, on the CPU and elsewhere, where the host would wait for many small ones
MAX_WEIGHTS, MAX_WEIGHTS_ELSEWHERE = 1 << 21, 1 << 27


def indexer_loss(
    scores: IndexerScores,
    query: Tensor,
    key: Tensor,
    limits: Limits,
    scale: float,
    seen: Limits | None = None,
    queries: slice = slice(None),
) -> Tensor:
    """The mean over queries of KL(attention || indexer), a scalar; differentiable in the tensors of `scores` alone.

    Where attention sees more keys than the indexer chooses among, both are distributions over the latter, and a query counts by
    the share of its attention that they have.

    Args:
        scores: of the indexer, `[B, 1, Q, K]`.
        query, key: of the attention, `[B, H, Q, D]` and `[B, G, K, D]`.
        limits: which keys a query may choose; one that may choose none has no part in the mean.
        scale: what multiplies `query @ key`.
        seen: which keys attention sees; by default those of `limits`.
        queries: those that are looked at, by default all.
    """
    query, key = query.detach(), key.detach()
    learned = scores.query, scores.key, scores.weights
    gives = torch.is_grad_enabled() and any(t.requires_grad for t in learned)
    leaves = [t.detach().requires_grad_(gives) for t in learned]
    total, counted = key.new_zeros(2, dtype=torch.float32)
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in leaves if gives]
    for some in pieces_of_queries(queries, query, key, scores.query.shape[2]):
        part, count = _of_piece(
            replace(scores, query=leaves[0], key=leaves[1], weights=leaves[2]), query, key, (limits, seen), scale, some
        )
        total, counted = total + part.detach(), counted + count
        if gives:
            for sum_, gradient in zip(sums, torch.autograd.grad(part, leaves), strict=True):
                sum_ += gradient
    counted = counted.clamp(min=torch.finfo(torch.float32).tiny)
    if not gives:
        return total / counted
    found: Any = _Known.apply(total / counted, [sum_ / counted for sum_ in sums], *learned)
    return found


class _Known(torch.autograd.Function):
    """A value with the gradients that were found beside it."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *learned: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [t.dtype for t in learned]
        return value.clone()

    @staticmethod
    def backward(ctx, given: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("the loss of an indexer")
        found = (t * given for t in ctx.saved_tensors)
        return None, None, *(t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True))


def pieces_of_queries(queries: slice, query: Tensor, key: Tensor, more_heads: int = 0) -> Iterator[slice]:
    """Some of the queries at a time, so few that the weights of their heads and of `more_heads` fit a piece."""
    batch, heads, length, _ = query.shape
    most = MAX_WEIGHTS if query.device.type == "cpu" else MAX_WEIGHTS_ELSEWHERE
    first, stop, step = queries.indices(length)
    stride = step * max(1, most // max(1, 2 * batch * (heads + more_heads) * key.shape[2]))
    for begin in range(first, stop, stride):
        yield slice(begin, min(begin + stride, stop), step)


def attention_weights(query: Tensor, key: Tensor, seen: Tensor | None, scale: float, some: slice) -> Tensor:
    """What dense attention of some queries weighs the keys, `[B, H, m, K]`; zeros of a query that sees none."""
    grouped = query[:, :, some].float().unflatten(1, (key.shape[1], -1))
    products = (grouped @ key[:, :, None].float().mT).flatten(1, 2) * scale
    if seen is None:
        return products.softmax(-1)
    return products.masked_fill_(~seen, -torch.inf).softmax(-1).nan_to_num_()


def _of_piece(
    scores: IndexerScores, query: Tensor, key: Tensor, limits: tuple[Limits, Limits | None], scale: float, some: slice
) -> tuple[Tensor, Tensor]:
    """The sum over some queries, and how many of them see a key, each by the share that it counts by."""
    every, device = slice(0, key.shape[2]), key.device.type
    with torch.autocast(device, enabled=False):
        found = scores.scores(some, every)[:, 0]  # [B, m, K]
    with torch.no_grad(), torch.autocast(device, enabled=False):
        within, seen = (None if one is None else one.seen(some, every, key.device) for one in limits)
        target = attention_weights(query, key, within if limits[1] is None else seen, scale, some).mean(1)  # [B, m, K]
        within = torch.ones((), dtype=torch.bool, device=key.device) if within is None else within
        within = within.expand(len(key), 1, *target.shape[1:])[:, 0]
        target = target.where(within, 0)
        share = target.sum(-1)  # [B, m]
        entropy = torch.special.entr(target).sum(-1) - torch.special.entr(share)
        has_any = within.any(-1, keepdim=True)
    # a query that may choose nothing would make NaN of its gradient
    found = found.masked_fill(~within & has_any, -torch.inf).log_softmax(-1)
    cross = -(target * found.where(within, 0)).sum(-1)
    return (cross - entropy).sum(), share.sum()


@dataclass
class IndexerLosses(Learning):
    """The losses of the indexers of a model, one for each pass of each layer that has one.

    Args:
        every: a layer that was given an indexer is looked at by one query in `every`, from one on that is drawn.
    """

    each: list[Tensor] = field(default_factory=list)
    scored: dict[nn.Module, tuple[IndexerScores, Limits]] = field(default_factory=dict)
    every: int = 1

    def mean(self) -> Tensor:
        """The mean over all layers and passes.

        Raises:
            ValueError: no pass was made within the context.
        """
        if not self.each:
            raise ValueError(
                "no layer with an indexer was computed within `indexer_losses(model)`; call the model in it"
            )
        return torch.stack(self.each).mean()

    def scores(self, indexer: nn.Module, scores: IndexerScores, limits: Limits) -> None:
        self.scored[indexer] = scores, limits

    def attention(self, indexer: nn.Module | None, query: Tensor, key: Tensor, scale: float) -> None:
        if indexer in self.scored:
            scores, limits = self.scored.pop(indexer)
            self.each.append(indexer_loss(scores, query, key, limits, scale))

    def layer(self, module: nn.Module, call: AttentionCall) -> None:
        if call.indexed is None:
            return
        assert call.pattern is not None
        positions = positions_plan(call)
        chosen = next(one for one in read_content(call.pattern).chosen if one.content.uses_indexer)
        limits, seen = find_rest(positions, chosen.cut, call.q.shape[0]).limits, all_that_is_seen(call, positions)
        queries = slice(int(torch.randint(self.every, ())), None, self.every)
        self.each.append(indexer_loss(call.indexed, call.q, call.k, limits, call.scoring.scale, seen, queries))


def all_that_is_seen(call: AttentionCall, positions: BlockPlan) -> Limits:
    """The keys that dense attention of a decoder sees: the past of a query's own document."""
    if positions.is_bare:
        return Limits(q_offset=call.q_offset)
    rows = torch.arange(call.q.shape[0], device=call.q.device)[:, None, None, None]
    return Limits(q_offset=call.q_offset, allows=partial(replace(positions, patterns=(EVERYTHING,)).allows, rows, 0))


@contextmanager
def indexer_losses(model: nn.Module, every: int = 1) -> Iterator[IndexerLosses]:
    """Within, passes of a model gather the losses of its indexers, which have a gradient for the indexers' parameters alone.

    Args:
        model: of a family with an indexer of DeepSeek Sparse Attention, or one that was given indexers by `topk(..., 'indexer')`.
        every: a layer that was given one is looked at by one query in `every`, from one on that is drawn in each pass.

    Raises:
        ValueError: a model without such an indexer, or one with gradient checkpointing, which computes layers again later.

    Examples:
        >>> from sparse_hf import sparsify
        >>> from transformers import DeepseekV32Config
        >>> sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> heads = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
        >>> config = DeepseekV32Config(**sizes, **heads, num_key_value_heads=4, index_topk=16, index_head_dim=16, index_n_heads=4)
        >>> model = sparsify(AutoModelForCausalLM.from_config(config))
        >>> ids = torch.randint(3, 97, (1, 100))
        >>> with indexer_losses(model) as losses:
        ...     loss = model(input_ids=ids, labels=ids).loss
        >>> (loss + losses.mean()).backward()
    """
    if not any(isinstance(module, (DsaIndexer, Indexer)) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no indexer that scores single keys; make a model of DeepSeek V3.2 or a family like it sparse "
            "first, with sparse_hf.sparsify(model), or give a dense decoder one by the pattern topk(..., 'indexer')"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "gradient checkpointing computes layers again, behind the losses of their indexers; switch it off"
        )
    found = IndexerLosses(every=whole("every", every, 1))
    token = LEARNING.set(found)
    try:
        yield found
    finally:
        LEARNING.reset(token)
