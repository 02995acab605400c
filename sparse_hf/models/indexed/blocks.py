"""The indexer of MiniMax-M3, which chooses blocks of keys for each group of heads by the best score in a block.

Blocks are counted from the first token of a text, as its positions are, so that a row that is padded on the left gives what it
gives alone. Transformers counts them from the padding.

Legend: B batch, I heads of the indexer, Q queries, K keys, D head dim of the indexer, N blocks that are chosen; a piece has m
queries and n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from ...attention.chosen import Limits, choose
from ..hf.chosen_keys import refuse_documents_of, refuse_graphs
from ..hf.mask_request import MaskRequest


@dataclass(frozen=True, eq=False)
class BestInBlock:
    """Scores of blocks `[B, I, m, n]`: the greatest product of a query and a key of the block that is not behind it.

    Args:
        query: `[B, I, Q, D]`.
        key: `[B, K, D]`.
        position: `[B, Q]`, of the queries among the keys.
        size: of a block.
        local: so many last blocks, that of the query included, are before all others.
    """

    query: Tensor
    key: Tensor
    position: Tensor
    size: int
    local: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, -(-self.key.shape[1] // self.size)

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def numbers_per_score(self) -> int:
        return 2 * self.query.shape[0] * self.query.shape[1] * self.size

    def scores(self, queries: slice, keys: slice) -> Tensor:
        tokens = torch.arange(keys.start * self.size, keys.stop * self.size, device=self.device)
        key = self.key[:, None, tokens[0] : tokens[-1] + 1].float()
        position = self.position[:, None, queries, None]  # [B, 1, m, 1]
        products = self.query[:, :, queries].float() @ key.mT
        products = pad(products, (0, len(tokens) - products.shape[-1]))
        products = products.masked_fill_(tokens > position, -torch.inf)
        distance = position // self.size - torch.arange(keys.start, keys.stop, device=self.device)
        is_local = (distance < self.local) & (distance >= 0)
        return products.unflatten(-1, (-1, self.size)).amax(-1).masked_fill_(is_local, torch.inf)


class BlockIndexer(torch.nn.Module):
    """Chooses as the dense indexer after it among the bases does, some queries at a time."""

    # of that name in the dense module, see `derive_indexed`
    rotary: ClassVar[str] = "apply_rotary_pos_emb"
    turn: ClassVar[Any]
    # of the dense class
    layer_idx: int
    head_dim: int
    block_size: int
    topk_blocks: int
    local_blocks: int
    q_proj: Any
    k_proj: Any
    q_norm: Any
    k_norm: Any

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None,
        position_ids: Tensor,
    ) -> Tensor:
        """The blocks of each query, `[B, I, Q, N]` int32, below 0 where there are fewer.

        Args:
            position_ids: `[B, Q]`, counted from the first token of each row, see `BlockAttention`.
        """
        refuse_graphs()
        query, key = (
            norm(project(hidden_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
            for norm, project in ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj))
        )
        cos, sin = (t[..., : self.head_dim] for t in position_embeddings)
        query, key = self.turn(query, key, cos, sin)
        end = key.shape[2]
        if cache is not None:
            layer: Any = cache.layers[self.layer_idx]
            key, end = layer.update_index(key), int(layer.get_seq_length())
        key = key[:, 0, :end]
        start = end - 1 - position_ids[:, -1]
        if start.any():
            # blocks begin where the text does
            places = (start[:, None] + torch.arange(end, device=key.device)).clamp(max=end - 1)
            key = key.gather(1, places[..., None].expand_as(key))
        scores = BestInBlock(query, key, position_ids, self.block_size, self.local_blocks)
        return choose(
            scores, self.topk_blocks, Limits(end=position_ids.div(self.block_size, rounding_mode="floor") + 1)
        )


class BlockAttention(torch.nn.Module):
    """Before the dense attention module among the bases: tells the indexer where queries stand in their text."""

    indexer: Any

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, past_key_values=None, **kwargs):
        cache = past_key_values if cache is None else cache
        if self.indexer is not None and isinstance(attention_mask, MaskRequest):
            refuse_documents_of(attention_mask, hidden_states.shape[1])
            slots = int(attention_mask.q_offset) + torch.arange(hidden_states.shape[1], device=hidden_states.device)
            kwargs["position_ids"] = slots - attention_mask.first_real(hidden_states.device)[:, None]
        # by position, since its name has changed
        forward: Any = super().forward
        return forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
