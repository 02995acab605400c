"""What an indexer learns from: how far its scores are from what attention to all keys would weigh (arXiv:2512.02556, 2.1).

The distribution of a query over its keys is the mean over the heads of the dense attention weights; the loss is its
Kullback-Leibler divergence from the softmax of the indexer's scores. It is computed some queries at a time, and again in the
backward pass, so that nothing of two lengths is kept.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; a piece has m queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...attention.chosen import IndexerScores, Limits
from ..hf.chosen_keys import LEARNING, Learning
from .dsa import DsaIndexer

# numbers of a piece
MAX_WEIGHTS = 1 << 21


def indexer_loss(scores: IndexerScores, query: Tensor, key: Tensor, limits: Limits, scale: float) -> Tensor:
    """The mean over all queries of KL(attention || indexer), a scalar; differentiable in the tensors of `scores` alone.

    Args:
        scores: of the indexer, `[B, 1, Q, K]`.
        query, key: of the attention, `[B, H, Q, D]` and `[B, G, K, D]`.
        limits: which keys a query may choose; one that may choose none has no part in the mean.
        scale: what multiplies `query @ key`.
    """
    batch, heads, queries, _ = query.shape
    step = max(1, MAX_WEIGHTS // max(1, 2 * batch * (heads + scores.query.shape[2]) * key.shape[2]))
    query, key = query.detach(), key.detach()
    total, counted = scores.key.new_zeros((), dtype=torch.float32), 0
    for first in range(0, queries, step):
        some = slice(first, min(first + step, queries))
        seen = limits.seen(some, slice(0, key.shape[2]), key.device)
        part, count = checkpoint(  # pyright: ignore[reportGeneralTypeIssues]
            _of_piece,
            scores.query,
            scores.key,
            scores.weights,
            scores.scale,
            query,
            key,
            seen,
            scale,
            some,
            use_reentrant=False,
        )
        total, counted = total + part, counted + count
    return total / torch.as_tensor(counted).clamp(min=1)


def _of_piece(
    of_query: Tensor, of_key: Tensor, weights: Tensor, of_scale: float, query: Tensor, key: Tensor, seen: Tensor | None,
    scale: float, some: slice,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum over some queries, and how many of them see a key."""
    found = IndexerScores(of_query, of_key, weights, of_scale).scores(some, slice(0, key.shape[2]))[:, 0]  # [B, m, K]
    with torch.no_grad():
        grouped = query[:, :, some].float().unflatten(1, (key.shape[1], -1))
        products = (grouped @ key[:, :, None].float().mT).flatten(1, 2) * scale  # [B, H, m, K]
        seen = torch.ones((), dtype=torch.bool, device=key.device) if seen is None else seen
        seen = seen.expand(len(key), 1, *products.shape[2:])
        products.masked_fill_(~seen, -torch.inf)
        target = products.softmax(-1).mean(1).nan_to_num()
        seen = seen[:, 0]
        entropy = torch.special.entr(target).sum(-1)  # [B, m]
        sees = seen.any(-1)
    # a query that sees nothing would make NaN of its gradient
    found = found.masked_fill(~seen & sees[..., None], -torch.inf).log_softmax(-1)
    cross = -(target * found.where(seen, 0)).sum(-1)
    return ((cross - entropy) * sees).sum(), sees.sum()


@dataclass
class IndexerLosses(Learning):
    """The losses of the indexers of a model, one for each pass of each layer that has one."""

    each: list[Tensor] = field(default_factory=list)
    scored: dict[nn.Module, tuple[IndexerScores, Limits]] = field(default_factory=dict)

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


@contextmanager
def indexer_losses(model: nn.Module) -> Iterator[IndexerLosses]:
    """Within, passes of a model gather the losses of its indexers, which have a gradient for the indexers' parameters alone.

    Args:
        model: of a family with an indexer of DeepSeek Sparse Attention.

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
    if not any(isinstance(module, DsaIndexer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no indexer that scores single keys; make a model of DeepSeek V3.2 or a family like it sparse "
            "first, with sparse_hf.sparsify(model)"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "gradient checkpointing computes layers again, behind the losses of their indexers; switch it off"
        )
    found = IndexerLosses()
    token = LEARNING.set(found)
    try:
        yield found
    finally:
        LEARNING.reset(token)
