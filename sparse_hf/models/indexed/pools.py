"""Indexers that score pools of neighbouring keys, and keep the tokens of the best pools and the ones behind the last whole pool.

GLM-5-Next learns what a pool is made of. Qwen4-Exp takes the mean of its keys and turns it to where the pool begins; its dense
class does so for each query anew. Pools are counted from the first real token.

Legend: B batch, I heads of the indexer, Q queries, K keys, D head dim of the indexer, P pools of R tokens, N chosen tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from ...attention.chosen import IndexerScores, Limits, choose
from ..hf.chosen_keys import Choice, refuse_documents, refuse_documents_of, refuse_graphs
from ..hf.mask_request import MaskRequest


def tokens_of_pools(pools: Tensor, tokens: Tensor) -> Tensor:
    """The tokens `[B, Q, N * R]` of chosen pools `[B, Q, N]`, below 0 for none, whose tokens are `[B, P, R]`."""
    if not tokens.shape[1]:
        return pools.new_empty(*pools.shape[:2], 0)
    rows = torch.arange(len(pools), device=pools.device)[:, None, None]
    return tokens.int()[rows, pools.long().clamp(min=0)].masked_fill_((pools < 0)[..., None], -1).flatten(2)


def tail(begin: Tensor, end: Tensor, most: int) -> Tensor:
    """Numbers from `begin` to before `end`, `[B, Q]` each: `[B, Q, most]`, below 0 for none."""
    numbers = begin[..., None] + torch.arange(most, device=begin.device)
    return numbers.masked_fill(numbers >= end[..., None], -1)


def _in_order(request: MaskRequest, key: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """The tokens of rows with real ones first, `[B, K]`, and the real ones up to each query, `[B, Q]`; layers of a pass share them."""
    own = "real tokens in order", new, key.device
    if own not in request.memo:
        real = request.real_tokens(len(key), int(request.q_offset) + new, key.device)
        request.memo[own] = (~real).int().argsort(dim=1, stable=True), real.long().cumsum(1)[:, -new:]
    return request.memo[own]


class LearnedPoolIndexer(torch.nn.Module):
    """That of GLM-5-Next."""

    rotary: ClassVar[str] = ""
    # of the dense class
    layer_idx: int
    n_heads: int
    head_dim: int
    index_topk: int
    index_kpool: int
    index_kpool_always_select_tail: bool
    index_kpool_compress_gate: Tensor
    softmax_scale: float
    wq_b: Any
    wk: Any
    k_norm: Any
    weights_proj: Any
    get_pooled_states: Any

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, q_resid: Tensor, attention_mask: Tensor, cache: Cache | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """The keys of each query, `[B, Q, N]` int32, below 0 where there are fewer.

        Args:
            attention_mask: `[B, Q]`, which of the new tokens are real.
        """
        cache = past_key_values if cache is None else cache
        refuse_graphs()
        query = self.wq_b(q_resid).unflatten(-1, (-1, self.head_dim))
        gate = torch.nn.functional.linear(hidden_states, self.index_kpool_compress_gate)
        key = self.k_norm(self.wk(hidden_states))
        states, end = torch.cat([key, gate, attention_mask.to(key.dtype)[..., None]], -1), hidden_states.shape[1]
        if cache is not None:
            states = cache.update_indexer(states, self.layer_idx)
            layer: Any = cache.layers[self.layer_idx]
            end = int(layer.get_seq_length())
            states = states[:, :end]
        real, size = states[..., -1].bool(), self.index_kpool
        slots = end - hidden_states.shape[1] + torch.arange(hidden_states.shape[1], device=real.device)
        pool_keys, tokens, whole = self.get_pooled_states(packed_states=states)

        def allows(query: Tensor, pool: Tensor) -> Tensor:
            # its last token is seen, and none of it is padding
            return whole[:, None, None, pool] & (tokens[:, None, None, pool, -1] <= slots[query])

        weights = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float() * self.n_heads**-0.5
        scores = IndexerScores(query, pool_keys, weights, self.softmax_scale)
        pools = choose(scores, self.index_topk // size, Limits(allows=allows))[:, 0]
        chosen = tokens_of_pools(pools, tokens)
        if self.index_kpool_always_select_tail and size > 1:
            seen = real.long().cumsum(1)[:, slots]
            last = real.long().argmax(1)[:, None] + seen
            chosen = torch.cat([chosen, tail(last - seen % size, last, size - 1).int()], -1)
        return chosen.masked_fill(~attention_mask[..., None].bool(), -1)


class ChoiceAsMask(torch.nn.Module):
    """Before the dense attention module of GLM-5-Next among the bases: hands its choice on, and makes no mask of it."""

    def forward(self, hidden_states, attention_mask, cache=None, past_key_values=None, **kwargs):
        refuse_documents(kwargs.get("document_positions"), attention_mask)
        # by position, since its name has changed
        forward: Any = super().forward
        return forward(hidden_states, attention_mask, past_key_values if cache is None else cache, **kwargs)

    def build_attention_mask_from_topk(self, topk_indices: Tensor, query_states: Tensor, kv_length: int) -> Choice:
        return Choice(topk_indices[:, None])


class MeanPoolIndexer(torch.nn.Module):
    """That of Qwen4-Exp."""

    rotary: ClassVar[str] = "apply_rotary_pos_emb"
    # of that name in the dense module, see `derive_indexed`
    turn: ClassVar[Any]
    # of the dense class
    layer_idx: int
    index_n_heads: int
    index_head_dim: int
    compress_ratio: int
    block_topk: int
    index_qk_proj: Any
    q_layernorm: Any
    k_layernorm: Any

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any,
        cache: Cache | None = None, past_key_values: Cache | None = None,
    ) -> Choice:  # fmt: skip
        """The keys of each query.

        Args:
            position_embeddings: cosines and sines of all tokens so far.
            attention_mask: what the model asked its mask function for.
        """
        cache = past_key_values if cache is None else cache
        refuse_graphs()
        if not isinstance(attention_mask, MaskRequest):
            raise NotImplementedError(
                "a 4-D attention_mask says pair by pair which keys a query sees, and pools of keys are made once for all queries; pass a "
                "2-D attention_mask"
            )
        refuse_documents_of(attention_mask, hidden_states.shape[1])
        new, size = hidden_states.shape[1], self.compress_ratio
        cos, sin = position_embeddings
        joined = self.index_qk_proj(hidden_states).unflatten(-1, (-1, self.index_head_dim))
        query, key = self.q_layernorm(joined[:, :, : self.index_n_heads]), joined[:, :, self.index_n_heads]
        query = self.turn(query, cos=cos[:, -new:], sin=sin[:, -new:], unsqueeze_dim=2)
        if cache is not None:
            key = cache.update_indexer(key, self.layer_idx)
        order, seen = _in_order(attention_mask, key, new)
        count = order.shape[1] // size
        tokens = order[:, : count * size].unflatten(1, (count, size))  # [B, P, R]
        rows = torch.arange(len(key), device=key.device)[:, None]
        pooled = self.k_layernorm(key[rows[..., None], tokens].float().mean(2).to(key.dtype))
        begins = tokens[..., 0]
        cos, sin = (angles.expand(len(key), -1, -1)[rows, begins] for angles in position_embeddings)
        pooled = self.turn(pooled[:, :, None], cos=cos, sin=sin, unsqueeze_dim=2).squeeze(2)
        weights = query.new_full(query.shape[:3], self.index_head_dim**-0.5, dtype=torch.float32)
        scores = IndexerScores(query, pooled, weights)
        pools = choose(scores, self.block_topk, Limits(end=seen // size))[:, 0]
        behind = tail(seen - seen % size, seen, size - 1)
        behind = order[rows[..., None], behind.clamp(min=0)].masked_fill(behind < 0, -1)
        return Choice(torch.cat([tokens_of_pools(pools, tokens), behind.int()], -1)[:, None])
