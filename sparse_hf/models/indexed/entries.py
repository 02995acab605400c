"""DeepSeek V4: layers attend to a window of keys, and to entries into each of which a stretch of the text is compressed.

Of the entries of short stretches an indexer chooses the best (CSA); those of long ones are all attended to (HCA). A key's
number among both is that of the window's keys, and behind these that of an entry. As in Transformers, stretches are counted
from the first slot of a row, padding included.

Legend: B batch, Q queries, K keys of the window, T entries, R tokens of a stretch, D head dim, N chosen entries.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attention.chosen import IndexerScores, Limits, choose
from ..hf.chosen_keys import refuse_documents, refuse_graphs
from ..hf.mask_request import MaskRequest


class Entries(NamedTuple):
    """What the compressor of a layer has chosen."""

    count: int
    chosen: Tensor | None  # [B, 1, Q, N], below 0 for none


NO_ENTRIES = Entries(0, None)
# of the layer that is computed
_ENTRIES: ContextVar[Entries] = ContextVar("entries", default=NO_ENTRIES)


class EntryIndexer(torch.nn.Module):
    """Chooses as the dense indexer after it among the bases does, some queries at a time."""

    rotary: ClassVar[str] = "apply_rotary_pos_emb"
    # of that name in the dense module, see `derive_indexed`
    turn: ClassVar[Any]
    # of the dense class
    compress_rate: int
    head_dim: int
    index_topk: int
    rope_layer_type: str
    q_b_proj: Any
    rotary_emb: Any
    scorer: Any

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, layer_idx: int
    ) -> Tensor:
        """The entries of each query, `[B, 1, Q, N]` int32, below 0 where there are fewer."""
        refuse_graphs()
        key = _compressed(self, "indexer", hidden_states, _layer(cache, layer_idx), self.turn)
        cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids, layer_type=self.rope_layer_type)
        query = self.q_b_proj(q_residual).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query = self.turn(query, cos, sin).transpose(1, 2)
        weights = self.scorer.weights_proj(hidden_states).float() * self.scorer.weights_scaling
        scores = IndexerScores(query, key, weights, self.scorer.softmax_scale)
        return choose(scores, self.index_topk, Limits(end=(position_ids + 1) // self.compress_rate))


class ChosenEntries(torch.nn.Module):
    """Before the dense compressor of short stretches among the bases: hands its choice on, and makes no mask of it."""

    head_dim: int
    indexer: Any

    def forward(
        self, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, layer_idx: int
    ) -> tuple[Tensor, None]:
        """All entries so far, `[B, 1, T, D]`."""
        entries = _compressed(self, "compressor", hidden_states, _layer(cache, layer_idx), self.indexer.turn)
        _ENTRIES.set(Entries(entries.shape[1], self.indexer(hidden_states, q_residual, position_ids, cache, layer_idx)))
        return entries[:, None], None


class AllEntries(torch.nn.Module):
    """Before the dense compressor of long stretches among the bases."""

    compress_rate: int

    def forward(
        self, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, layer_idx: int
    ) -> tuple[Tensor, None]:
        """All entries so far, `[B, 1, T, D]`."""
        # by position, since the name of the cache has changed; for a single token the dense class makes no mask
        forward: Any = super().forward
        entries, _ = forward(hidden_states, q_residual, position_ids[:, :1], cache, layer_idx)
        number = torch.arange(entries.shape[2], device=entries.device, dtype=torch.int32)
        # a single token sees all, as in the dense class; its position would say less behind padding alone
        seen = (
            (position_ids + 1) // self.compress_rate
            if position_ids.shape[1] > 1
            else position_ids.new_full((1, 1), len(number))
        )
        _ENTRIES.set(Entries(len(number), torch.where(number < seen[:, None, :, None], number, -1)))
        return entries, None


class WindowAndEntries(torch.nn.Module):
    """Before the dense attention module among the bases: says which keys and entries each query attends to."""

    sliding_window: int

    def forward(
        self,
        hidden_states,
        position_embeddings,
        position_ids,
        attention_mask,
        cache=None,
        past_key_values=None,
        **kwargs,
    ):
        token = _ENTRIES.set(NO_ENTRIES)
        try:
            # by position, since the name of the cache has changed
            forward: Any = super().forward
            cache = past_key_values if cache is None else cache
            return forward(hidden_states, position_embeddings, position_ids, attention_mask, cache, **kwargs)
        finally:
            _ENTRIES.reset(token)

    def own_choice(self, mask: Any, query: Tensor, key: Tensor, kwargs: Any) -> Tensor:
        """`[B, 1, Q, N]` int32, see `choice_of`."""
        if mask is not None and not isinstance(mask, MaskRequest):
            raise NotImplementedError(
                "a 4-D attention_mask says nothing of entries into which the text is compressed; pass a 2-D attention_mask"
            )
        (count, entries), (batch, _, new, _) = _ENTRIES.get(), query.shape
        # keys of the window stand before the entries
        keys = key.shape[2] - count
        real = None if mask is None else mask.attention_mask
        positions = kwargs.get("document_positions")
        if positions is not None and keys == new:
            refuse_documents(positions, None if real is None else real[:, :new])
        last = torch.arange(keys - new, keys, device=key.device, dtype=torch.int32)[:, None]
        near = last - torch.arange(self.sliding_window, device=key.device, dtype=torch.int32)
        near = near.masked_fill(near < 0, -1).expand(batch, 1, -1, -1)
        if real is not None:
            real = real[:, -keys:] if real.shape[1] >= keys else pad(real, (keys - real.shape[1], 0))
            seen = real.to(key.device)[:, None].gather(2, near.clamp(min=0).long().flatten(2)).view_as(near)
            near = near.masked_fill(~seen, -1)
        if entries is None:
            return near
        return torch.cat([near, torch.where(entries < 0, -1, entries + keys).expand(batch, -1, -1, -1).int()], -1)


def _layer(cache: Any, layer_idx: int) -> Any:
    return None if cache is None else cache.layers[layer_idx]


def _compressed(module: Any, name: str, states: Tensor, layer: Any, turn: Any) -> Tensor:
    """The entries of short stretches `[B, T, D]`, those in the cache included, each of two stretches that overlap.

    Args:
        module: the compressor or the indexer, which has one of its own.
        name: what the cache calls it.
        states: `[B, Q, ...]` of the new tokens.
        layer: of the cache, or None.
        turn: the dense module's function for positions.
    """
    content, gate = module.kv_proj(states), module.gate_proj(states)
    rate, dim, first = module.compress_rate, module.head_dim, 0
    if layer is None:
        whole = content.shape[1] // rate * rate
        content, gate = content[:, :whole], gate[:, :whole]
    else:
        content, gate, first = layer.store_compression_weights(name, content, gate)
    count = content.shape[1] // rate
    if not count:
        found = content.new_zeros(len(content), 0, dim)
        return found if layer is None else layer.update_compressor_states(name, found)
    content = content.unflatten(1, (count, rate))  # [B, T, R, 2 D]
    gate = gate.unflatten(1, (count, rate)) + module.position_bias
    before = None, None
    if layer is not None:
        before = layer.update_overlap_state(name, content, gate, dim)
    content, gate = (
        _with_stretch_before(t, dim, was, nothing)
        for t, was, nothing in zip((content, gate), before, (0.0, -torch.inf), strict=True)
    )
    weights = gate.softmax(dim=2, dtype=torch.float32).to(content.dtype)
    found = module.kv_norm((content * weights).sum(2))
    places = (torch.arange(count, device=found.device) * rate + first).expand(len(found), -1)
    cos, sin = module.rotary_emb(found, position_ids=places, layer_type=module.rope_layer_type)
    found = turn(found[:, None], cos, sin).squeeze(1)
    return found if layer is None else layer.update_compressor_states(name, found)


def _with_stretch_before(t: Tensor, dim: int, before: Tensor | None, nothing: float) -> Tensor:
    """`[B, T, 2 R, D]` of `[B, T, R, 2 D]`: the first dims of the stretch before, and the last ones of a stretch."""
    first = t.new_full((len(t), 1, t.shape[2], dim), nothing) if before is None else before[:, None].to(t.dtype)
    return torch.cat([torch.cat([first, t[:, :-1, :, :dim]], 1), t[..., dim:]], 2)
