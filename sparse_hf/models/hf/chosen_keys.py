"""Layers that choose their keys by content: which pairs they may choose among, and attention to what they chose.

A choice is an index: of each query the keys that it attends to, by number, below 0 for none. It was made among the pairs that
the model's own mask, padding and the layer's pattern allow, so that attention to it asks nothing of these any more.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; C heads of the choice, N keys chosen for a query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...attention import with_weights
from ...attention.backend import AttentionCall
from ...attention.chosen import Latents, Limits, attend_chosen, attend_latent
from ...attention.chosen.choice import ChosenKeys
from ...attention.dropout import Dropout
from ...attention.merge import with_sink
from ...attention.scoring import Scoring
from ...plan import NOTHING, build_plan
from .documents import number_documents
from .inner_padding import counts_positions
from .layer_call import tokens_first
from .mask_request import MaskRequest, TokenData, layer_pattern


class Learning(Protocol):
    """Who is told, within a context, what indexers scored and what attention would have weighed.

    Attributes:
        needs_gradient: is it told nothing where no gradient is asked for?
    """

    needs_gradient: ClassVar[bool] = True

    def scores(self, indexer: Any, scores: Any, limits: Limits) -> None:
        """An indexer's scores, with a gradient for its parameters, and the pairs that it may choose among."""
        ...

    def attention(self, indexer: Any, query: Tensor, key: Tensor, scale: float) -> None:
        """The tensors of the attention of the layer that has this indexer."""
        ...

    def layer(self, module: Any, call: AttentionCall) -> None:
        """The call of a layer whose pattern chooses by the scores of an indexer, with this pattern and these scores."""
        ...


# of the context that goes on
LEARNING: ContextVar[Learning | None] = ContextVar("learning", default=None)

# what the keys and values of the layer that is computed are made of, where it has not made them
LATENTS: ContextVar[Latents | None] = ContextVar("latents", default=None)


def refuse_graphs() -> None:
    """Raise NotImplementedError in compiled code."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "keys are chosen by content one piece of the text after another, which is no single graph; run without torch.compile"
        )


def _said(context: ContextVar[Any]) -> Any:
    """What a context says; None in compiled code, which knows none and chooses no keys."""
    return None if torch.compiler.is_compiling() else context.get()


def learning() -> Learning | None:
    """Who is told now; None if nobody is."""
    found = _said(LEARNING)
    return found if found is not None and (torch.is_grad_enabled() or not found.needs_gradient) else None


def tell_learning(module: Any, query: Tensor, key: Tensor, scale: float) -> None:
    """Tell whoever learns what the attention of a layer would have weighed."""
    learns = learning()
    if learns is not None:
        learns.attention(getattr(module, "indexer", None), query, key, scale)


@dataclass(frozen=True, eq=False)
class Choice:
    """The keys of each query, `[B, C, Q, N]` with C one of 1, G and H, where a class hands them on in place of a mask."""

    index: Tensor


def choice_of(module: Any, mask: Any, query: Tensor, key: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer chose, `[B, C, Q, N]`, wherever its class says it; None of a layer that chooses nothing.

    Args:
        module: the attention module.
        mask, query, key, kwargs: what it hands to its attention function.
    """
    own = getattr(module, "own_choice", None)
    if own is not None:
        refuse_bounds(kwargs)
        return own(mask, query, key, kwargs)
    chosen, blocks = kwargs.get("indices"), kwargs.get("block_indices")
    if not isinstance(mask, Choice) and chosen is None and blocks is None:
        return None
    refuse_bounds(kwargs)
    if isinstance(mask, Choice):
        return mask.index
    if blocks is None:
        assert chosen is not None
        return chosen[:, None]
    return _tokens_of_blocks(module, mask, query, key, blocks)


def _tokens_of_blocks(module: Any, mask: Any, query: Tensor, key: Tensor, blocks: Tensor) -> Tensor:
    """The tokens of chosen blocks `[B, C, Q, N]` that the query may see; blocks are counted from the first real token."""
    size = module.indexer.block_size
    request = MaskRequest.of(mask, query, key, module.config)
    begins = request.first_real(key.device)[:, None, None, None] + blocks * size
    tokens = (begins[..., None] + torch.arange(size, device=key.device)).flatten(3)
    limits = limits_of_choice(module, request, query, key)
    hidden = (blocks < 0).repeat_interleave(size, -1) | (tokens >= key.shape[2])
    slots = torch.arange(query.shape[2], device=key.device)[:, None]
    if limits.q_offset is not None:
        hidden |= tokens > slots + limits.q_offset
    if limits.allows is not None:
        hidden |= ~limits.allows(slots, tokens.clamp(0, key.shape[2] - 1))
    return tokens.masked_fill_(hidden, -1).int()


def refuse_documents(positions: Tensor | None, real: Tensor | None) -> None:
    """Raise NotImplementedError for rows of packed documents, whose keys would be pooled across documents.

    Args:
        positions: `[B or 1, Q]`, what the model was told of the new tokens.
        real: `[B, Q]` bool, true on real tokens; None if all are.
    """
    if positions is not None and number_documents(positions, real).any():
        raise NotImplementedError(
            "position_ids begin anew inside a row, as in rows of packed documents, and this family scores keys by blocks of a row, which "
            "would mix them; have one text to a row"
        )


def refuse_documents_of(request: MaskRequest, queries: int) -> None:
    """The same of what a model asked its mask function for."""
    real = request.attention_mask
    if not int(request.q_offset):
        refuse_documents(request.said.get("document_positions"), None if real is None else real[:, :queries])


def limits_of_choice(module: Any, mask: MaskRequest | Tensor, query: Tensor, key: Tensor) -> Limits:
    """The pairs that a layer may choose among: those of its pattern, of the model's own mask, and of real tokens.

    Args:
        module: the indexer, which has the configuration and the number of its layer.
        mask: what its layer got, or the pairs of one that the user made, `[B or 1, Q, K]`.
        query, key: `[B, heads, Q, D]` and `[B, heads, K, D]`, for their lengths and device.

    Raises:
        NotImplementedError: padding inside a row under a pattern that counts positions.
    """
    request = MaskRequest.of(mask[:, None] if isinstance(mask, Tensor) else mask, query, key, module.config)
    is_causal, opaque = request.reading(module_is_causal=True)
    pattern = layer_pattern(module, request.stack(module), is_causal=False)
    own = "limits", pattern, is_causal, query.shape[2], key.shape[2], key.device
    if own not in request.memo:
        found = _limits(request, pattern, opaque, query, key)
        request.memo[own] = replace(found, q_offset=int(request.q_offset)) if is_causal else found
    return request.memo[own]


def _limits(request: MaskRequest, pattern: str, opaque: Callable | None, query: Tensor, key: Tensor) -> Limits:
    """What beside causality limits a choice. Patterns are of positions, so that none need be cut to the past."""
    batch = request.batch(TokenData(request.said.get("document_positions")), query, key, shifts=False)
    counts = counts_positions(pattern)
    if batch.padding_first is not None and counts:
        raise NotImplementedError(
            f"attention_mask has padding inside a row, around which {pattern} cannot count where keys are chosen by content; "
            "pad on the left or on the right"
        )
    if batch.info.is_empty and opaque is None and not counts:
        return Limits()
    real, documents, _ = batch.info.tensors
    plan = build_plan(
        pattern, query.shape[2], key.shape[2], q_offset=int(request.q_offset), key_padding_mask=real,
        segment_ids=documents, mask_function=opaque, device=key.device,
    )  # fmt: skip
    rows = torch.arange(query.shape[0], device=key.device)[:, None, None, None]
    return Limits(allows=partial(plan.allows, rows, 0))


def chosen_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scoring: Scoring, dropout: float, sinks: Tensor | None,
    wants_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention `[B, Q, H, D]` to the keys that were chosen, `[B, C, Q, N]`, and the weights `[B, H, Q, K]` if they are wanted."""
    latents = _said(LATENTS)
    if latents is not None and not wants_weights and sinks is None and scoring.softcap is None and not dropout:
        return tokens_first(attend_latent(query, latents, chosen, scale=scoring.scale)), None
    key, value = made_of_latents(key, value)
    if not wants_weights:
        out, _ = attend_chosen(
            query, key, value, chosen, scale=scoring.scale, sinks=sinks, soft_cap=scoring.softcap, dropout=dropout
        )
        return tokens_first(out), None
    call = AttentionCall(query, key, value, None, 0, scoring, Dropout.draw(dropout), NOTHING)
    out, lse, weights = with_weights(
        call, ChosenKeys(chosen).as_mask(key.shape[2]).repeat_interleave(query.shape[1] // chosen.shape[1], 1)
    )
    if sinks is not None:
        out, weights = with_sink(out, lse, sinks), with_sink(weights, lse, sinks)
    return tokens_first(out), weights


def made_of_latents(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as they are, or made of the latents of a layer that has not made them."""
    latents = _said(LATENTS)
    return (key, value) if latents is None else latents.keys_and_values()


def refuse_bounds(kwargs: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for packed documents that are said in a way that no indexer hears of."""
    if kwargs.get("cu_seq_lens_k") is not None or kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "cu_seq_lens do not reach layers that choose keys by content, which would choose across documents; pass position_ids that "
            "begin anew in each document, and no cu_seq_lens"
        )
