"""sparse_deberta and sparse_deberta_v2: DeBERTa (arXiv:2006.03654) and DeBERTa-v3 (arXiv:2111.09543) with sparse attention.

The score of query i and key j is `(q_i k_j + q_i P[d] + k_j R[d]) / scale`, where P and R are projections of a table of
distances and d is the bucket of the distance i - j. Scores are computed block of queries by block of queries, over the keys
that the pattern holds for it, and computed again for gradients: no tensor has two lengths.

Legend: B batch, H heads, N tokens, D head dim, S rows of the table; m queries of a block, n keys that it sees, s rows it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.utils.checkpoint import checkpoint
from transformers import DebertaConfig, DebertaV2Config
from transformers.masking_utils import bidirectional_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deberta.modeling_deberta import DebertaEncoder
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention as DebertaAttention
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    make_log_bucket_position,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention as DebertaV2Attention

from ..attention.backend import AttentionCall
from .dense_families import EMBEDDED
from .derived.attention_modules import number_attention
from .hf.attention_interface import sparse_mask
from .hf.config import SparseConfigMixin
from .hf.positions import ChosenPositions, Positions
from .hf.register import register_family


class SparseDebertaConfig(SparseConfigMixin, DebertaConfig):
    model_type = "sparse_deberta"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _keep_distances(self)


class SparseDebertaV2Config(SparseConfigMixin, DebertaV2Config):
    model_type = "sparse_deberta_v2"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _keep_distances(self)


def _keep_distances(config: DebertaConfig | DebertaV2Config) -> None:
    """Write out the greatest distance, which is the greatest length by default, and must not grow with it."""
    if config.max_relative_positions < 1:
        config.max_relative_positions = config.max_position_embeddings


@dataclass(frozen=True, eq=False)
class Disentangled:
    """Attention whose scores depend on content and distance.

    Attributes:
        of_queries: `[H, S, D]`, what queries are multiplied with; None without this part.
        of_keys: `[H, S, D]`, what keys are multiplied with; None without this part.
        rows: `[2 N - 1]` on the CPU, ascending: the row of the table for the distances (query - key) from `1 - N` up.
    """

    of_queries: Tensor | None
    of_keys: Tensor | None
    rows: Tensor

    # a loop over the blocks of a plan is no graph
    @torch.compiler.disable
    def __call__(self, call: AttentionCall, wants_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """The output `[B, H, N, D]` of a call over its plan, and the weights `[B, H, N, N]` if they are wanted.

        Raises:
            NotImplementedError: torch.export, which cannot record how many blocks a text has.
        """
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "DeBERTa's scores depend on content and distance, and are computed block by block, as many as a text has, which "
                "torch.export cannot record; export the dense model (sparse-hf export --to dense)"
            )
        plan, found, rows = call.blocks, torch.zeros_like(call.q), self.rows.to(call.q.device)
        weights = call.q.new_zeros(*call.q.shape[:3], plan.kv_len) if wants_weights else None
        attend = partial(checkpoint, _attend, use_reentrant=False) if torch.is_grad_enabled() else _attend
        shared = None
        for b, p, i, runs in plan.table_rows():
            if not runs:
                continue
            if shared != (b, p):
                shared, batch = (b, p), slice(None) if plan.batch_rows == 1 else slice(b, b + 1)
                heads = [h for h, own in enumerate(plan.heads) if own == p] if plan.heads else slice(None)
                q, k, v = (t[batch][:, heads] for t in (call.q, call.k, call.v))
            queries = plan.block_range(i, i, plan.q_len)
            keys = [plan.block_range(run.first, run.last, plan.kv_len) for run in runs]
            index = torch.cat([torch.arange(*one, device=call.q.device) for one in keys])
            mask = torch.cat([plan.mask(b, p, queries, one) for one in keys], 1)
            # rows ascend with the distance, so that a block needs those from its least to its greatest
            least, greatest = queries[0] - keys[-1][1] + 1, queries[1] - 1 - keys[0][0]
            first, last = (int(self.rows[plan.kv_len - 1 + d]) for d in (least, greatest))
            distances = torch.arange(*queries, device=call.q.device)[:, None] - index
            of_queries, of_keys = (
                None if t is None else t[heads, first : last + 1] for t in (self.of_queries, self.of_keys)
            )
            tables = of_queries, of_keys, rows[distances + plan.kv_len - 1] - first
            of_block = q[:, :, slice(*queries)], k[:, :, index], v[:, :, index]
            out, own_weights = attend(*of_block, tables, mask, call.scoring.scale, call.dropout.p)
            found[batch, heads, slice(*queries)] = out
            if weights is not None:
                of_rows = torch.zeros_like(weights[batch][:, heads, slice(*queries)])
                weights[batch, heads, slice(*queries)] = of_rows.index_copy(-1, index, own_weights.to(weights.dtype))
        return found, weights


def _attend(
    q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor | None, Tensor | None, Tensor], mask: Tensor, scale: float, p: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output `[B, H, m, D]` of a block, and the weights `[B, H, m, n]`.

    Args:
        tables: those of queries and of keys, `[H, s, D]`, and the rows of both, `[m, n]`.
        mask: `[m, n]`.
    """
    of_queries, of_keys, rows = tables
    scores = q @ k.mT
    if of_queries is not None:
        scores = scores + (q @ of_queries.mT).gather(-1, rows.expand_as(scores))
    if of_keys is not None:
        scores = scores + (k @ of_keys.mT).gather(-1, rows.T.expand_as(scores.mT)).mT
    sees = mask.any(-1, keepdim=True)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    weights = scores.masked_fill(~mask & sees, -torch.inf).softmax(-1) * sees
    return drop(weights.to(v.dtype), p) @ v, weights


class DisentangledMixin:
    """What the attention of both versions has in common; a mixin before the dense class."""

    is_causal = False
    # a mixin stands before a dense class, whose attributes a type checker does not find here
    config: Any
    pos_att_type: list[str]

    def forward(
        self: Any, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
        rel_embeddings=None, **kwargs,
    ):  # fmt: skip
        assert query_states is None and relative_pos is None
        qkv = self.projected(hidden_states)
        own = None
        if self.relative_attention and rel_embeddings is not None:
            distances = torch.arange(1 - hidden_states.shape[1], hidden_states.shape[1])
            of_queries, of_keys = self.projected_table(self.pos_dropout(rel_embeddings))
            own = Disentangled(of_queries, of_keys, self.rows_of(distances).clamp(0, rel_embeddings.shape[0] - 1))
        # by this name layers that attend are found
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # pyright: ignore[reportArgumentType]
        scale = (qkv[0].shape[-1] * (1 + len(self.pos_att_type))) ** -0.5
        dropout = self.dropout.p if self.training else 0.0
        out, weights = attend(self, *qkv, attention_mask, scale, dropout, computed_by=own, **kwargs)
        return out.flatten(2), weights if output_attentions else None

    def by_head(self: Any, states: Tensor) -> Tensor:
        """`[..., N, H D]` -> `[..., H, N, D]`."""
        return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(-2, -3)


class SparseDebertaAttention(DisentangledMixin, DebertaAttention):
    """Distances have a row each, up to a greatest one."""

    def projected(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.talking_head:
            raise NotImplementedError("talking_head mixes the scores of heads, which sparse attention keeps apart")
        q, k, v = self.by_head(self.in_proj(states)).chunk(3, -1)
        return q + self.by_head(self.q_bias[None]), k, v + self.by_head(self.v_bias[None])

    def projected_table(self, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
        of_queries = self.by_head(self.pos_proj(table)) if "c2p" in self.pos_att_type else None
        return of_queries, self.by_head(self.pos_q_proj(table)) if "p2c" in self.pos_att_type else None

    def rows_of(self, distances: Tensor) -> Tensor:
        return distances + self.max_relative_positions


class SparseDebertaV2Attention(DisentangledMixin, DebertaV2Attention):
    """Far distances share a row, more of them the farther they are."""

    def projected(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.by_head(project(states)) for project in (self.query_proj, self.key_proj, self.value_proj))
        return q, k, v

    def projected_table(self, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
        shares, kinds = self.share_att_key, self.pos_att_type
        of_queries = (self.key_proj if shares else self.pos_key_proj)(table) if "c2p" in kinds else None
        of_keys = (self.query_proj if shares else self.pos_query_proj)(table) if "p2c" in kinds else None
        return tuple(None if t is None else self.by_head(t) for t in (of_queries, of_keys))  # pyright: ignore[reportReturnType]

    def rows_of(self, distances: Tensor) -> Tensor:
        if self.position_buckets > 0:
            distances = make_log_bucket_position(distances, self.position_buckets, self.max_relative_positions)
        return distances.long() + self.pos_ebd_size


class StackMixin:
    """A stack that makes neither a mask nor distances of all pairs; a mixin before the dense class."""

    def get_attention_mask(self: Any, attention_mask: Tensor) -> Any:
        if attention_mask.ndim > 2:
            return attention_mask.bool()[:, None] if attention_mask.ndim == 3 else attention_mask.bool()
        rows, tokens = attention_mask.shape
        config = self.layer[0].attention.self.config
        return sparse_mask(
            rows,
            tokens,
            tokens,
            mask_function=bidirectional_mask_function,
            attention_mask=attention_mask.bool(),
            config=config,
        )

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None) -> None:
        return None


class SparseDebertaEncoder(StackMixin, DebertaEncoder):
    """The stack of DeBERTa."""


class SparseDebertaV2Encoder(StackMixin, DebertaV2Encoder):
    """The stack of DeBERTa-v2 and -v3."""


def positions_of(config: Any) -> Positions:
    """How a configuration has it: without `position_biased_input` there is no table of positions."""
    # its scores are of states and distances
    weighs = config.relative_attention
    if not config.position_biased_input:
        return Positions("relative" if weighs else "none")
    return replace(EMBEDDED, weighs_distances=weighs)


OF_HEADS = {"number_layers": number_attention, "keeps_arguments": True}
register_family(
    SparseDebertaConfig,
    EMBEDDED,
    parts={DebertaAttention: SparseDebertaAttention, DebertaEncoder: SparseDebertaEncoder},
    of_heads=OF_HEADS,
)
register_family(
    SparseDebertaV2Config,
    EMBEDDED,
    parts={DebertaV2Attention: SparseDebertaV2Attention, DebertaV2Encoder: SparseDebertaV2Encoder},
    of_heads=OF_HEADS,
)
SparseDebertaConfig.positions = SparseDebertaV2Config.positions = ChosenPositions(EMBEDDED, positions_of)  # pyright: ignore[reportAttributeAccessIssue]
