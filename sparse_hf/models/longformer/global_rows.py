"""Self-attention with projections of their own for global tokens: what Longformer and LED share (arXiv:2004.05150).

A token sees what its layer's pattern holds through `query`, `key` and `value`, one softmax over all of it. The row of a
marked token is computed through `query_global`, `key_global` and `value_global` instead, so that the pattern's
`marked()` falls into two halves: its keys belong to the rows of all tokens, its queries are rows of their own.

Legend: B batch, N tokens, H heads, D head dim, E = H * D, M most marked tokens of any batch row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...attention import BACKENDS
from ...attention.backend import AttentionCall
from ...attention.dropout import Dropout
from ...attention.scoring import Scoring
from ...plan import NOTHING
from ..hf.config import SparseConfigMixin
from ..hf.joined import joined_attention
from ..hf.own_modules import attend_by_pattern, backend_of
from ..hf.processes import owes_gradients
from ..hf.projections import are_plain, is_host_bound, joined
from ..hf.tensor_parallel import own_heads
from ..hf.text_parts import TextPart
from .halves import ALL_KEYS, AskedOfHalves, both_halves, halves
from .rows import marked_only, replaced_rows, taken, write_rows
from .tokens import MarkedRows, Tokens
from .unprojected import unprojected_rows

LOCAL, GLOBAL = ("query", "key", "value"), ("query_global", "key_global", "value_global")

# the mixin stands before a dense class, whose attributes a type checker finds here
_Module = nn.Module if TYPE_CHECKING else object


class GlobalRowsMixin(_Module):
    """For `LongformerSelfAttention` and its copy in LED: attention by pattern, any length, causal or dilated per head."""

    config: SparseConfigMixin
    layer_id: int
    num_heads: int
    head_dim: int
    dropout: float
    # the stack of `sparse_attention.layers` that the module belongs to
    stack = ""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tokens | None = None, output_attentions=False, **_
    ) -> tuple[Tensor, ...]:
        """`[B, N, E]` in and out, and `[B, H, N, N]` weights if asked for.

        What Transformers passes as masks is one `Tokens` here. Its compact form of the weights (global keys first, then
        the window) is not made: "sparse_reference", the only one to show weights, has the whole square.
        """
        tokens = Tokens(NOTHING) if attention_mask is None else attention_mask
        pattern = self.config.layer_pattern(self.layer_id, stack=self.stack)
        if tokens.part is not None:
            return (self._of_part(hidden_states, pattern, tokens.part),)
        joins = is_host_bound(hidden_states) and are_plain(self._projections(LOCAL + GLOBAL))
        # marked tokens that see every key need no plan, unless weights are drawn or shown
        sees_all = tokens.rows is not None and not (self.training and self.dropout) and not output_attentions
        one_node = self._in_one_node(hidden_states, pattern, tokens) if joins and sees_all else None
        if one_node is not None:
            return (one_node,)
        q, k, v = self._project(LOCAL, hidden_states, joins)
        local, rows = halves(own_heads(pattern, self, q.shape[2] // self.head_dim, self.num_heads))
        out, weights = self._attend((q, k, v), local, tokens, output_attentions)
        if rows is None or tokens.marks is None:
            out = _by_token(out)
            out = out if rows is None else self._keep_gradients(out, hidden_states)
        elif rows == ALL_KEYS and sees_all:
            assert tokens.rows is not None
            out = self._full_rows(_by_token(out), hidden_states, tokens.rows)
        elif rows == ALL_KEYS and tokens.batch.segments is None and not output_attentions:
            out = _by_token(self._sorted_rows(out, hidden_states, tokens))
        else:
            q, k, v = self._project(GLOBAL, hidden_states)
            global_out, global_weights = self._attend((q, k, v), rows, tokens, output_attentions)
            is_marked = tokens.marks[:, None, :, None]
            out = _by_token(torch.where(is_marked, global_out, out))
            if weights is not None and global_weights is not None:
                weights = torch.where(is_marked, global_weights, weights)
        return (out,) if weights is None else (out, weights)

    def _of_part(self, states: Tensor, pattern: str, part: TextPart) -> Tensor:
        """Attention `[B, n, E]` of this process's tokens to a text that several processes hold."""
        q, k, v = map(self._heads, self._project(LOCAL, states))
        local, rows = halves(own_heads(pattern, self, q.shape[1], self.num_heads))
        dropout = Dropout.draw(self.dropout if self.training else 0.0)
        call = AttentionCall(q, k, v, local, 0, Scoring(self.head_dim**-0.5), dropout, NOTHING, wants_lse=False)
        out, _ = part.attention(call, backend_of(self.config))
        if rows is None:
            return self._keep_gradients(_by_token(out), states)
        q, k, v = map(self._heads, self._project(GLOBAL, states))
        found = part.marked_rows(replace(call, q=q, k=k, v=v, pattern=rows), out)
        return self._keep_gradients(_by_token(out), states) if found is None else _by_token(found)

    def _in_one_node(self, states: Tensor, pattern: str, tokens: Tokens) -> Tensor | None:
        """Attention `[B, N, E]` by plain projections, where the host is what takes time.

        None by a pattern without marked rows, and by a backend that autograd differentiates, which would run twice.
        """
        heads, backend = self._projections(LOCAL)[0].weight.shape[0] // self.head_dim, backend_of(self.config)
        both = both_halves(*halves(own_heads(pattern, self, heads, self.num_heads)), heads)
        by_name = BACKENDS.get(backend)
        if both is None or by_name is not None and by_name.uses_autograd:
            return None
        pairs = zip(self._projections(LOCAL), self._projections(GLOBAL), strict=True)
        scoring, batch = Scoring(self.head_dim**-0.5), tokens.batch
        asked = AskedOfHalves(both, self.head_dim, scoring, batch, backend, batch.memo, tokens=tokens)
        return joined_attention(states, [module for pair in pairs for module in pair], asked)

    def _full_rows(self, out: Tensor, states: Tensor, where: MarkedRows) -> Tensor:
        """`out` `[B, N, E]` with the rows of marked tokens replaced, which see every key: M * N work, wherever they are."""
        query, key, value = projections = self._projections(GLOBAL)
        most = len(where.index) // len(states)
        # rare queries are brought to the states rather than all states to them. Weights are read for it
        is_less_work = 2 * most * self.num_heads <= states.shape[2]
        if is_less_work and are_plain(projections):
            return unprojected_rows(out, states, where, self.head_dim, (query, key, value))
        q = query(states.flatten(0, 1).index_select(0, where.index))
        k, v = key(states), value(states)
        q = q.view(len(states), most, -1)  # [B, M, E]
        mask = None if where.seen is None else where.seen[:, None]
        q, k, v = map(self._heads, (q, k, v))
        rows = scaled_dot_product_attention(q, k, v, mask)
        rows = rows.transpose(1, 2).reshape(-1, out.shape[-1])  # [B * M, E]
        return write_rows(out, marked_only(rows, where), where.marked)

    def _sorted_rows(self, out: Tensor, states: Tensor, tokens: Tokens) -> Tensor:
        """`out` `[B, H, N, D]` with the rows of marked tokens replaced, computed by a plan of tokens in another order.

        What sees every key does not ask where keys stand, so that marked tokens can be brought side by side. A graph
        has N rows here, most of which see nothing; and dropout is the same on every backend.
        """
        assert tokens.order is not None and tokens.marks is not None
        where = tokens.rows
        index = tokens.order if where is None else tokens.order[:, : len(where.index) // len(states)]
        is_marked = None if where is not None and where.slots is None else tokens.marks.gather(1, index)
        (q,) = self._project(GLOBAL[:1], taken(states, index))
        k, v = self._project(GLOBAL[1:], taken(states, tokens.order))
        rows, _ = self._attend((q, k, v), ALL_KEYS, tokens.sorted())  # [B, H, M, D]
        return replaced_rows(out, rows, index, is_marked)

    def _keep_gradients(self, out: Tensor, states: Tensor) -> Tensor:
        """`out`, and gradients of 0 of what a batch without marks does not use, where other processes wait for them."""
        if not owes_gradients(self):
            return out
        query, key, value = (projection(states[0, :0]) for projection in self._projections(GLOBAL))
        nowhere = torch.empty(0, dtype=torch.int64, device=out.device)
        return write_rows(out, (query + key + value).to(out.dtype), nowhere)

    def _projections(self, names: Sequence[str]) -> list[nn.Linear]:
        return [getattr(self, name) for name in names]

    def _project(self, names: Sequence[str], states: Tensor, joins: bool = False) -> list[Tensor]:
        """What the projections of these names make of `states`, `[B, N, E]` each."""
        modules = self._projections(names)
        return list(joined(states, modules)) if joins else [module(states) for module in modules]

    def _heads(self, t: Tensor) -> Tensor:
        """`[B, H, N, D]` of `[B, N, E]`."""
        return t.view(*t.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _attend(
        self, qkv: tuple[Tensor, Tensor, Tensor], pattern: str, tokens: Tokens, wants_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention `[B, H, N, D]` by a pattern, of queries, keys and values `[B, N, E]`, and the weights if asked for."""
        q, k, v = map(self._heads, qkv)
        dropout = self.dropout if self.training else 0.0
        return attend_by_pattern(
            self.config, (q, k, v), pattern, tokens.batch, q_offset=0, dropout=dropout, wants_weights=wants_weights
        )


def _by_token(t: Tensor) -> Tensor:
    """`[B, N, E]` of `[B, H, N, D]`."""
    return t.transpose(1, 2).flatten(2).contiguous()


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: Tensor,
    tokens: Tokens,
    output_attentions: bool,
    output_hidden_states: bool,
    layerdrop: float = 0.0,
) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """The last states, and if asked for those of every layer and the weights."""
    states, weights = [hidden_states], []
    for layer in layers:
        # LayerDrop (arXiv:1909.11556)
        if not layerdrop or torch.rand([]) >= layerdrop:
            found = layer(hidden_states, attention_mask=tokens, output_attentions=output_attentions)
            hidden_states = found[0]
            weights += found[1:]
        if output_hidden_states:
            states.append(hidden_states)
    return hidden_states, tuple(states) if output_hidden_states else None, tuple(weights) if output_attentions else None
