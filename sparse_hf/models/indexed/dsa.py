"""The indexer of DeepSeek Sparse Attention (arXiv:2512.02556) and of families that took it over: it scores keys in pieces.

The score of a key is the sum over the heads of the indexer of `weight * relu(query . key)`; the best `index_topk` of the past
are attended to, by all heads. Projections, norms and caches are those of the dense class, whose own method makes the scores
of all pairs and takes no gradient.

Legend: B batch, I heads of the indexer, Q queries, K keys, D head dim of the indexer, N keys that are chosen.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from ...attention.chosen import IndexerScores, choose
from ..hf.chosen_keys import learning, limits_of_choice, refuse_graphs

# cosines and sines `[B, Q, D of what is turned]`, and positions `[B, Q]`
Positions = tuple[tuple[Tensor, Tensor], Tensor | None]


class DsaIndexer(torch.nn.Module):
    """Chooses as the dense indexer after it among the bases does, and never holds the scores of all pairs.

    Attributes:
        rotary: the function of the dense module by which queries and keys of the indexer are turned.
        turns_last: are the last dims of a head turned, in place of the first?
    """

    rotary: ClassVar[str] = "apply_rotary_pos_emb"
    turns_last: ClassVar[bool] = False
    # of that name, see `derive_indexed`
    turn: ClassVar[Any]
    # of the dense class
    layer_idx: int
    n_heads: int
    head_dim: int
    qk_rope_head_dim: int
    index_topk: int
    softmax_scale: float
    wq_b: Any
    wk: Any
    k_norm: Any
    weights_proj: Any

    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """The keys of each query, `[B, Q, N]` int32, below 0 where there are fewer."""
        cache = past_key_values if cache is None else cache
        refuse_graphs()
        learns = learning()
        with torch.set_grad_enabled(learns is not None):
            # what a model learns otherwise passes no indexer
            states, q_resid = hidden_states.detach(), q_resid.detach()
            cos, sin = (angles.detach() for angles in position_embeddings)
            scores = self.scores(states, q_resid, ((cos, sin), position_ids), cache)
        limits = limits_of_choice(self, attention_mask, scores.query.transpose(1, 2), scores.key[:, None])
        if learns is not None:
            learns.scores(self, scores, limits)
        return choose(scores, self.index_topk, limits)[:, 0]

    def scores(self, states: Tensor, q_resid: Tensor, positions: Positions, cache: Cache | None) -> IndexerScores:
        """What keys are scored by, those of the cache included, to which the new ones are added."""
        query = self.wq_b(q_resid).unflatten(-1, (self.n_heads, self.head_dim))
        # some keep their norm in single precision
        key = self.k_norm(self.wk(states).to(self.k_norm.weight.dtype)).to(states.dtype)[:, :, None]
        query, key = self.turned(query, key, positions)
        key = key.squeeze(2)
        if cache is not None:
            key = cache.update_indexer(key, self.layer_idx)
        weight = self.weights_proj(states.to(self.weights_proj.weight.dtype)).float()
        return IndexerScores(query, key, weight * self.n_heads**-0.5, self.softmax_scale)

    def turned(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Queries and keys `[B, Q, I or 1, D]` by their positions."""
        dims = self.qk_rope_head_dim
        sizes = [self.head_dim - dims, dims] if self.turns_last else [dims, self.head_dim - dims]
        both = [t.split(sizes, dim=-1) for t in (query, key)]
        turning = self.turn(*(parts[self.turns_last] for parts in both), *positions[0], unsqueeze_dim=2)
        joined = (
            (parts[0], new) if self.turns_last else (new, parts[1]) for parts, new in zip(both, turning, strict=True)
        )
        query, key = (torch.cat(parts, dim=-1) for parts in joined)
        return query, key


class InterleavedIndexer(DsaIndexer):
    """Positions turn neighbouring dims against each other (GLM-MoE-DSA)."""

    rotary = "apply_rotary_pos_emb_interleave"


class TrailingIndexer(DsaIndexer):
    """Positions turn the last dims of a head (HY-V4)."""

    turns_last = True


class ScaledIndexer(InterleavedIndexer):
    """Queries come of the states, and are scaled by their position; some layers turn nothing (Mistral Large 4)."""

    use_rope: bool
    q_input_norm: Any
    softmax_scaling: Any

    def forward(
        self, hidden_states, position_embeddings, attention_mask, position_ids, cache=None, past_key_values=None
    ) -> Tensor:
        return super().forward(
            hidden_states, hidden_states, position_embeddings, attention_mask, position_ids, cache, past_key_values
        )

    def scores(self, states: Tensor, q_resid: Tensor, positions: Positions, cache: Cache | None) -> IndexerScores:
        return super().scores(states, self.q_input_norm(states), positions, cache)

    def turned(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        query = self.softmax_scaling(query, positions[1], head_dim_first=False)
        return super().turned(query, key, positions) if self.use_rope else (query, key)
