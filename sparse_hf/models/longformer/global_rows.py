"""Self-attention with projections of their own for global tokens: what Longformer and LED share (arXiv:2004.05150).

A token sees what its layer's pattern holds through `query`, `key` and `value`, one softmax over all of it. The row of a
marked token is computed through `query_global`, `key_global` and `value_global` instead, so that the pattern's
`marked()` falls into two halves: its keys belong to the rows of all tokens, its queries are rows of their own.

Legend: B batch, N tokens, H heads, D head dim, E = H * D, M most marked tokens of any batch row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor, nn

from ...attention import sparse_attention
from ...pattern import FULL, First, Marked, MarkedKeys, MarkedQueries, Pattern
from ...plan import build_plan
from ..hf.attention_interface import attention_with_weights
from ..hf.config import IMPLEMENTATIONS
from ..hf.tensor_parallel import own_heads
from .unprojected import replace_rows, seen_keys, taken, with_rows

# the rows of marked tokens that see everything
ALL_KEYS = str(MarkedQueries())
# longer than any text: what holds on a square of this size holds on all
LONGEST = 1 << 30


@dataclass(frozen=True)
class Tokens:
    """What the layers are told of a batch, once per forward pass; None where there is nothing to say."""

    real: Tensor | None = None  # [B, N] bool
    marks: Tensor | None = None  # [B, N] bool, real tokens only
    order: Tensor | None = None  # [B, N] int64: indices of marked tokens, then of other real ones, then of padding
    most: int = 0  # M; a graph, which cannot look, takes N
    alike: bool = False  # does each row have as many marked tokens?

    def to(self, device) -> Tokens:
        values = (getattr(self, field.name) for field in fields(self))
        return Tokens(*(v.to(device) if isinstance(v, Tensor) else v for v in values))

    def sorted(self) -> Tokens:
        """The same tokens in `order`."""
        real = None if self.real is None else self.real.gather(1, self.order)
        return Tokens(real, self.marks.gather(1, self.order), None, self.most, self.alike)


def read_tokens(attention_mask: Tensor | None, global_attention_mask: Tensor | None) -> Tokens:
    """Read the two masks of a forward pass, `[B, N]` each."""
    given = {"attention_mask": attention_mask, "global_attention_mask": global_attention_mask}
    for name, mask in given.items():
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; it must be [batch, tokens]")
    real = None if attention_mask is None else attention_mask.bool()
    if global_attention_mask is None:
        return Tokens(real)
    marks = global_attention_mask.bool() if real is None else global_attention_mask.bool() & real
    most, alike = marks.shape[1], False
    if not torch.compiler.is_compiling():
        least, most = torch.stack(marks.sum(1).aminmax()).tolist()
        alike = least == most
        if not most:
            return Tokens(real)
    rank = marks.int() if real is None else marks.int() + real
    return Tokens(real, marks, rank.argsort(dim=1, descending=True, stable=True), most, alike)


class GlobalRowsMixin:
    """For `LongformerSelfAttention` and its copy in LED: attention by pattern, any length, causal or dilated per head."""

    # the stack of `sparse_attention.layers` that the module belongs to
    stack = ""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tokens | None = None, output_attentions=False, **_
    ) -> tuple:
        """`[B, N, E]` in and out, and `[B, H, N, N]` weights if asked for.

        What Transformers passes as masks is one `Tokens` here. Its compact form of the weights (global keys first, then
        the window) is not made: "sparse_reference", the only one to show weights, has the whole square.
        """
        tokens = Tokens() if attention_mask is None else attention_mask
        q, k, v = (self._heads(name, hidden_states) for name in ("query", "key", "value"))
        pattern = self.config.layer_pattern(self.layer_id, stack=self.stack)
        local, rows = halves(own_heads(pattern, self, q.shape[1], self.num_heads))
        out, weights = self._attend(q, k, v, local, tokens, output_attentions)
        if rows is not None and tokens.marks is not None:
            # a key's place means nothing to rows that see every key, so marked tokens can be brought side by side
            if rows == ALL_KEYS and not output_attentions:
                out = self._gathered_rows(hidden_states, out, tokens)
            else:
                q, k, v = (self._heads(f"{name}_global", hidden_states) for name in ("query", "key", "value"))
                global_out, global_weights = self._attend(q, k, v, rows, tokens, output_attentions)
                is_marked = tokens.marks[:, None, :, None]
                out = torch.where(is_marked, global_out, out)
                weights = torch.where(is_marked, global_weights, weights) if output_attentions else None
        out = out.transpose(1, 2).flatten(2)
        return (out, weights) if output_attentions else (out,)

    def _gathered_rows(self, hidden_states: Tensor, out: Tensor, tokens: Tokens) -> Tensor:
        """`out` `[B, H, N, D]` with the rows of marked tokens replaced: M * N work, wherever they stand."""
        index = tokens.order[:, : tokens.most]
        is_marked = None if tokens.alike else tokens.marks.gather(1, index)
        # a graph has N rows here, most of which see nothing; and dropout is the same on every backend
        as_pattern = torch.compiler.is_compiling() or (self.training and self.dropout)
        if not as_pattern and self._is_cheaper_unprojected(tokens.most):
            given = out, hidden_states, index, is_marked, tokens.real
            return replace_rows(*given, self.query_global, self.key_global, self.value_global)
        q = self._heads("query_global", taken(hidden_states, index))
        if as_pattern:
            states, tokens = taken(hidden_states, tokens.order), tokens.sorted()
            k, v = (self._heads(name, states) for name in ("key_global", "value_global"))
            rows, _ = self._attend(q, k, v, ALL_KEYS, tokens)  # [B, H, M, D]
        else:
            k, v = (self._heads(name, hidden_states) for name in ("key_global", "value_global"))
            rows = _see_all(q, k, v, tokens.real)
        return with_rows(out, rows, index, is_marked)

    def _is_cheaper_unprojected(self, most: int) -> bool:
        """Are marked tokens so few that their queries are brought to the states rather than all states to them?

        Weights are read for it, which must then be all that the projections do (no adapters, no hooks).
        """
        wide = 2 * most * self.num_heads > self.key_global.in_features
        return not wide and all(map(_is_bare, (self.query_global, self.key_global, self.value_global)))

    def _heads(self, name: str, states: Tensor) -> Tensor:
        return getattr(self, name)(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend(self, q, k, v, pattern: str, tokens: Tokens, with_weights=False) -> tuple[Tensor, Tensor | None]:
        batch = {"key_padding_mask": tokens.real, "marks": tokens.marks, "q_offset": 0}
        dropout = self.dropout if self.training else 0.0
        if with_weights:
            plan = build_plan(pattern, q.shape[2], k.shape[2], device=q.device, **batch)
            return attention_with_weights(q, k, v, plan, dropout)
        backend = IMPLEMENTATIONS[self.config._attn_implementation]
        return sparse_attention(q, k, v, pattern, **batch, dropout=dropout, backend=backend), None


def _is_bare(module: nn.Module) -> bool:
    """A linear layer whose weights say all."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooks and module.bias is not None


def _see_all(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Dense attention of a few queries to all real keys: M * N work, and no M x N tensor."""
    mask = None if real is None else seen_keys(real)[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def halves(text: str) -> tuple[str, str | None]:
    """The pattern of the rows of tokens that are not marked, and of those that are (None: a layer that does not ask)."""
    return _cached_halves(text)


@lru_cache(maxsize=256)
def _cached_halves(text: str) -> tuple[str, str | None]:
    both, keys, queries, nothing = (str(p) for p in (Marked(), MarkedKeys(), MarkedQueries(), First(0)))
    if both not in text and queries not in text:
        return text, None
    local = text.replace(both, keys).replace(queries, nothing)
    pattern = Pattern.parse(text)
    if all(_holds_everything(p) for p in pattern.heads or (pattern,)):
        return local, ALL_KEYS
    if pattern.heads:
        return local, str(type(pattern)(*(p & MarkedQueries() for p in pattern.heads)))
    return local, str(pattern & MarkedQueries())


def _holds_everything(pattern: Pattern) -> bool:
    """Does a marked query see every key?"""
    first, last, all_marked, none_marked = map(torch.tensor, (0, LONGEST, 2, 0))
    marks = all_marked.to(torch.int8), none_marked.to(torch.int8)
    return pattern.blocks(first, last, first, last, marks).item() == FULL


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


def window_pattern(attention_window: int | list[int], layer: int) -> str:
    """What `attention_window` means: the total width, so each side is half of it; and the global tokens."""
    width = attention_window if isinstance(attention_window, int) else attention_window[layer]
    return f"window({width // 2}, {width // 2}) | {Marked.word}()"


def wished(config, **given) -> tuple[bool, ...]:
    """What the caller said of the outputs, or else the configuration."""
    return tuple(getattr(config, name) if value is None else value for name, value in given.items())
