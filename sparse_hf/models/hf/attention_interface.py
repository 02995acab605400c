"""The one file that registers sparse attention with Transformers: its attention and mask interfaces.

Each of our names is registered in both. The mask function hands on what it was given (`MaskRequest`), untouched, and the
attention function takes the layer's pattern from the configuration. What a query may see is the pattern AND the model's
own mask AND padding: a pattern can only remove pairs.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from ...attention import attend, attention, content_weights, route, uses_content, with_weights
from ...attention.backend import AttentionCall
from ...attention.devices import is_autocast
from ...attention.dropout import Dropout
from ...attention.merge import with_sink
from ...attention.scoring import Scoring
from ...attention.slots.new_tokens import Filled
from ...pattern import Pattern, full
from ...pattern.base import as_pattern
from ...plan import NOTHING, BlockPlan, build_plan
from .answered import asked_alike, remember_answer, remember_slots
from .cache import LAYERS_SEE
from .chosen_keys import choice_of, chosen_attention, learning, made_of_latents, tell_learning
from .config import IMPLEMENTATIONS, SparseConfigMixin
from .documents import warn_of_mixing
from .indexer import INDEXED
from .inner_padding import CHECKED, PaddingFirst, counts_positions
from .input_checks import refuse_tracing
from .layer_call import LayerCall, Part, tokens_first
from .mask_request import FLEETING, MaskRequest, TensorLikeRequest, TokenData, layer_pattern, said_of, why_dense
from .pages import paged_attention
from .streamed import over_streaming_slots, to_pinned, with_sloped_sinks, with_turned_sinks
from .streaming_cache import StreamingCache
from .tensor_parallel import own_heads
from .text_parts import TEXT_PART, TextPart, check_part


def sparse_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    config=None,
    **_,
) -> MaskRequest:
    """What Transformers calls once per forward pass, with keywords."""
    if config is not None and not isinstance(config, SparseConfigMixin):
        raise ValueError(why_dense(config))
    # kept with the mask, which layers have whenever they are computed
    said = {name: value for name, value in said_of(config).items() if name != FLEETING}
    if isinstance(attention_mask, MaskRequest):
        # the model around a text has asked already, with what it alone knows of the tokens
        return replace(attention_mask, said=said, memo={})
    drops = not isinstance(kv_offset, int) or kv_offset
    if drops and (config is None or not config.own_caches):
        raise NotImplementedError(
            "the cache has dropped keys of its own accord (a sliding cache); use a DynamicCache, of which sparse attention "
            "reads only the keys that its pattern holds, or a StreamingCache, which drops what no pattern holds"
        )
    if attention_mask is not None and _is_shorter(attention_mask, kv_length):
        short = kv_length - attention_mask.shape[-1]
        attention_mask = torch.nn.functional.pad(attention_mask, (0, short), value=False)
    if attention_mask is not None and attention_mask.is_meta:
        # dense models refuse a mask without content, since they ask whether it pads anything; a sparse one is to behave alike
        bool(attention_mask.all())
    if isinstance(q_offset, Tensor):
        # a static cache gives its own counter, which it moves on before the attention function looks
        q_offset = q_offset.clone() if torch.compiler.is_compiling() else int(q_offset)
    own = frozenset() if config is None else config.own_mask_functions
    kind = TensorLikeRequest if config is not None and config.chooses_keys else MaskRequest
    return kind(attention_mask, mask_function, q_offset, own=own, said=said, shape=(batch_size, kv_length))


def _is_shorter(mask: Tensor, length: int) -> bool:
    if not torch.compiler.is_compiling():
        return mask.shape[-1] < length
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    # older versions of OPT make ones as long as the text, which a graph of a step does not know, and which nobody reads there
    return guard_or_false(mask.shape[-1] < length)


def sparse_attention_forward(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling=None,
    dropout=0.0,
    *,
    backend: str,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What an attention module of Transformers calls: `[B, H, Q, D]` in, `[B, Q, H, D]` out."""
    query, key, value = _of_autocast(query, key, value)
    sizes = query.shape, key.shape, query.device
    alike = asked_alike(module, sizes, attention_mask, (backend, scaling, dropout), kwargs)
    known = None if alike is None else attention_mask.memo.get(alike)
    if known is not None:
        return known.attend(query, key, value, dropout), None
    refuse_tracing()
    # the reference makes the n x n weights anyway, and whether somebody records them is not said here
    wants_weights = backend == "reference" and not torch.compiler.is_compiling()
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"))
    # a learned logit per head in the denominator (GPT-OSS), which takes its share by lse
    sinks = kwargs.get("s_aux")
    chosen = choice_of(module, attention_mask, query, key, kwargs)
    if chosen is not None:
        tell_learning(module, query, key, scoring.scale)
        return chosen_attention(query, key, value, chosen, scoring, dropout, sinks, wants_weights)
    key, value = made_of_latents(key, value)
    request = MaskRequest.of(attention_mask, query, key, module.config)
    kwargs = _with_what_was_said(request, kwargs)
    stack, bias = request.stack(module), _bias_of(kwargs)
    crosses = kwargs.get("is_cross_attention")
    if _crosses(module, stack.name) if crosses is None else crosses:
        return _cross_attention(query, key, value, _with_bias(attention_mask, bias), scaling, dropout, wants_weights)
    is_causal, opaque = request.reading(kwargs.get("is_causal", getattr(module, "is_causal", False)))
    bounds, streaming = kwargs.get("page_bounds"), kwargs.get("streaming_cache")
    pattern = layer_pattern(module, stack, is_causal or bounds is not None, opaque)
    if kwargs.get(LAYERS_SEE) is not None:
        pattern = kwargs[LAYERS_SEE][module.layer_idx]
    scoring = scoring if bias is None else replace(scoring, bias=bias)
    layer = LayerCall(
        module, request, stack, (query, key, value), pattern, scoring, opaque, sinks, Dropout.draw(dropout), backend, kwargs, None
    )  # fmt: skip
    if bounds is not None or streaming is not None:
        _check_cache(streaming, layer)
    if query.shape[1] != stack.heads:
        layer.pattern = own_heads(pattern, module, query.shape[1], stack.heads)
    if kwargs.get(TEXT_PART) is not None:
        check_part(opaque, kwargs)
        return _of_part(layer, kwargs[TEXT_PART]), None
    if bounds is not None:
        own = bounds[module.layer_idx]
        return paged_attention(query, key, value, layer.pattern, scoring, own, backend, sinks), None
    if streaming is None:
        return _in_order(layer, None, wants_weights, alike)
    layer.filled = streaming.filled(module.layer_idx, query.shape[2])
    part = to_pinned(layer, streaming)
    if streaming.in_place:
        if alike is not None and part is None:
            remember_slots(layer, streaming, alike)
        return over_streaming_slots(layer, part), None
    layer.request = request.of_held(streaming, module.layer_idx, query, key)
    return _in_order(layer, part, wants_weights)


def _in_order(
    layer: LayerCall, part: Part | None, wants_weights: bool, alike: tuple | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention `[B, Q, H, D]` to keys that lie in order and to what `part` found, and the weights if they are wanted.

    Args:
        alike: what other layers of the pass may find the answer by.
    """
    query, key, _ = layer.tensors
    skips = layer.kwargs.get("bias_skips_padding", False)
    shifts = skips or not layer.stack.counts_padding and counts_positions(layer.pattern)
    data = _token_data(layer.kwargs, layer.stack.name)
    data = data if layer.filled is None else replace(data, marks=layer.filled.marks)
    batch = layer.request.batch(data, query, key, shifts)
    real, documents, marks = batch.info.tensors
    order = batch.padding_first if shifts else None
    # packed documents begin anew, and with them their positions
    if documents is None:
        part = with_turned_sinks(layer, part, real, order)
    elif not torch.compiler.is_compiling():
        warn_of_mixing(layer.module.config)
    part = with_sloped_sinks(layer, part, real)
    if documents is None and layer.goes_by_slots:
        filled = Filled(torch.as_tensor(layer.request.q_offset).reshape(()), real, marks)
        return layer.over_slots(filled, part), None
    call = AttentionCall(
        *layer.tensors, layer.pattern, int(layer.request.q_offset), _of_place(layer), layer.dropout, batch.info,
        wants_lse=layer.wants_lse(part), indexed=layer.kwargs.get(INDEXED),
    )  # fmt: skip
    if call.indexed is not None and order is not None:
        raise NotImplementedError(
            "attention_mask has padding inside a row, around which no indexer scores; pad on the left or on the right"
        )
    learns = learning()
    if learns is not None:
        is_causal, _ = layer.request.reading(True)
        own = as_pattern(layer_pattern(layer.module, layer.stack, is_causal))
        learns.layer(layer.module, replace(call, pattern=own, chosen_plan=None))
    computed_by, opaque = layer.kwargs.get("computed_by"), layer.opaque
    reorders = (layer.scoring.bias is None and computed_by is None) or skips
    if order is not None and reorders:
        opaque = _reorder(call, order, opaque)
    elif order is not None:
        # the bias goes by distances in the row, padding included
        opaque = _as_mask(call, order, opaque)
    out, lse, weights = _computed(call, opaque, layer.backend, wants_weights and part is None, computed_by)
    if alike is not None and not wants_weights and part is None and order is None:
        remember_answer(layer, call, alike)
    out, lse = layer.with_rest(out, lse, part)
    if weights is not None and layer.sinks is not None:
        weights = with_sink(weights, lse, layer.sinks)
    if order is not None and reorders:
        out, weights = order.back(out), None if weights is None else order.weights_back(weights, key.shape[2])
    return tokens_first(out), weights


def _of_part(layer: LayerCall, part: TextPart) -> Tensor:
    """Attention `[B, Q, H, D]` of this process's tokens to a text that several processes hold."""
    call = AttentionCall(
        *layer.tensors, layer.pattern, 0, layer.scoring, layer.dropout, NOTHING, wants_lse=layer.wants_lse(None)
    )  # fmt: skip
    out, lse = part.attention(call, layer.backend)
    return tokens_first(layer.with_rest(out, lse, None)[0])


def _bias_of(kwargs: dict[str, Any]) -> Tensor | None:
    """The bias by distance that a family hands over; some hand over an empty vector where they have none."""
    bias = kwargs.get("position_bias")
    return None if bias is None or bias.ndim == 1 else bias


def _with_what_was_said(request: MaskRequest, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer with those of its pass that its class keeps from it.

    Raises:
        NotImplementedError: a layer would not know them when gradient checkpointing computes it again.
    """
    if not request.said:
        return kwargs
    kept = {name: value for name, value in request.said.items() if name not in kwargs and name != FLEETING}
    if kept and FLEETING in request.said and request.said[FLEETING]():
        raise NotImplementedError(
            f"this class keeps {next(iter(kept))} from its layers, which gradient checkpointing computes again; pass attention_mask "
            "too, by which they find it, or train without gradient checkpointing"
        )
    return {**kept, **kwargs}


def _token_data(kwargs: Mapping[str, Any], stack: str) -> TokenData:
    """What the model says of its tokens, from the arguments of an attention function."""
    positions = kwargs.get("document_positions", kwargs.get("position_ids"))
    bounds = kwargs.get("cu_seq_lens_k", kwargs.get("cu_seq_lens_q"))
    # of an encoder-decoder, the encoder's tokens are marked
    marks = None if stack == "decoder" else kwargs.get("global_attention_mask")
    return TokenData(positions, bounds, marks, bool(kwargs.get(CHECKED)))


def _of_place(layer: LayerCall) -> Scoring:
    """Scoring whose bias is that of queries at their place, where it was made for any place."""
    scoring, q_offset = layer.scoring, layer.request.q_offset
    if scoring.bias is None or not isinstance(q_offset, Tensor):
        return scoring
    query, key, _ = layer.tensors
    return replace(scoring, bias=scoring.bias[:, key.shape[2] - query.shape[2] - int(q_offset) :])


def _reorder(call: AttentionCall, order: PaddingFirst, opaque: Callable | None) -> Callable | None:
    """Put the tokens of a call in another order; returns the mask function for it."""
    call.q, call.batch, call.q_offset = order.queries_first(call.q), order.batch, order.length - call.q.shape[2]
    call.k, call.v = order.keys_first(call.k), order.keys_first(call.v)
    if call.scoring.bias is not None:
        # slots of a static cache behind the last token are gone
        call.scoring = replace(call.scoring, bias=call.scoring.bias[:, : 2 * order.length - 1])
    return None if opaque is None else order.mask_function(opaque)


def _as_mask(call: AttentionCall, order: PaddingFirst, opaque: Callable | None) -> Callable:
    """Have the pattern of a call evaluated pair by pair, on positions that count real tokens; returns the mask function.

    Raises:
        NotImplementedError: a pattern that cannot be.
    """
    pattern = Pattern.parse(call.pattern) if isinstance(call.pattern, str) else call.pattern
    assert pattern is not None
    if pattern.heads or pattern.uses_content:
        raise NotImplementedError(
            f"attention_mask has padding inside a row, around which {pattern} and a bias by distances cannot both be counted; pad on "
            "the left or on the right"
        )
    call.pattern, of_pattern = full(), order.pattern_as_mask(pattern)
    if opaque is None:
        return of_pattern
    return lambda b, h, q, k: of_pattern(b, h, q, k) & opaque(b, h, q, k)


def _computed(
    call: AttentionCall, opaque: Callable | None, backend: str, wants_weights: bool, computed_by: Callable | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Out `[B, H, Q, D]`, lse `[B, H, Q]` if the call wants it, and the weights if they are wanted.

    Args:
        computed_by: what computes the output of a family whose scores no backend knows.
    """
    if opaque is not None:
        call.chosen_plan = _opaque_plan(call, opaque)
    if computed_by is not None:
        call.pattern = _parsed(call.pattern)
        out, weights = computed_by(call, wants_weights)
        # it knows no lse
        return out, call.q.new_empty(0), weights
    if wants_weights:
        call.pattern = pattern = _parsed(call.pattern)
        by_content = opaque is None and uses_content(str(pattern))
        return content_weights(call) if by_content else with_weights(call)
    if opaque is not None:
        return *attend(call, route(call, backend)), None
    if not call.scoring.is_plain:
        call.scoring.check(call.q.shape[1], call.q_offset + call.q.shape[2] - 1, call.k.shape[2])
    return *attention(call, backend), None


def _parsed(pattern: Pattern | str | None) -> Pattern:
    assert pattern is not None
    return Pattern.parse(pattern) if isinstance(pattern, str) else pattern


def _of_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast gives SDPA: rotary positions leave queries and keys in float32 beside values in bfloat16."""
    if not is_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, dropout: float, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The output `[B, H, Q, D]` of a plan, and the weights `[B, H, Q, K]` on the way to it. O(n^2)."""
    scoring = Scoring(q.shape[-1] ** -0.5 if scale is None else scale)
    call = AttentionCall(q, k, v, None, plan.q_offset, scoring, Dropout.draw(dropout), NOTHING, chosen_plan=plan)
    out, _, weights = with_weights(call)
    return out, weights


def _crosses(module, stack: str) -> bool:
    """Does a module attend to another sequence? Its cost is linear in that sequence, and it stays dense."""
    kind = type(module)
    if kind.__name__.endswith("CrossAttention") or module.__dict__.get("is_cross_attention", False):
        return True
    # a bias by distances is within one text, of which some classes of older versions do not say that they read it causally
    return stack == "decoder" and not module.is_causal and not getattr(module, "has_relative_attention_bias", False)


# where a graph breaks before such a plan, nothing of its making is traced either
_build_untraced: Any = torch.compiler.disable(build_plan)


def _opaque_plan(call: AttentionCall, mask_function: Callable) -> BlockPlan:
    """The plan of a mask that can only be evaluated element by element."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "a mask function that sparse_hf does not know, or a 4-D attention mask, cannot be compiled; "
            "pass a 2-D attention mask, or run without torch.compile"
        )
    padding, segments, marks = call.batch.tensors
    if padding is None:
        # an opaque mask may differ from row to row, which the plan learns from the batch size of its data
        padding = torch.ones(call.q.shape[0], call.k.shape[2], dtype=torch.bool, device=call.k.device)
    call.pattern = _parsed(call.pattern)
    return _build_untraced(
        call.pattern, call.q.shape[2], call.k.shape[2], q_offset=call.q_offset, key_padding_mask=padding,
        segment_ids=segments, marks=marks, mask_function=mask_function, device=call.k.device,
    )  # fmt: skip


def _check_cache(cache: StreamingCache | None, layer: LayerCall) -> None:
    """Can a layer attend to the pages of continuous batching, or to a cache that drops keys (None: to pages)?"""
    if layer.scoring.bias is not None:
        raise NotImplementedError(
            "continuous batching knows no bias by distance; use generate, which takes padded batches"
            if cache is None
            else "a StreamingCache drops keys, and a bias by distance would count those that are left; use a DynamicCache"
        )
    if cache is None:
        return
    if layer.opaque is not None:
        raise NotImplementedError(
            "a mask function that sparse_hf does not know may speak of keys that a StreamingCache drops; use a DynamicCache"
        )
    number = layer.module.layer_idx
    kept = cache.patterns[number]
    if layer.pattern != kept:
        raise ValueError(
            f"the StreamingCache keeps what {kept} sees, and the pattern of layer {number} is {layer.pattern}; make it of this model's own "
            "configuration, StreamingCache(model.config)"
        )


def _with_bias(attention_mask, bias: Tensor | None):
    """The mask of another text with a bias of pairs, `[1, H, Q, K]`, which some families hand over where all of it is 0."""
    mask = attention_mask.attention_mask if isinstance(attention_mask, MaskRequest) else attention_mask
    if bias is None or mask is None:
        return attention_mask if bias is None else bias
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _cross_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling, dropout: float, wants_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention to another text, `[B, Q, H, D]`, and its weights `[B, H, Q, K]` if they are wanted."""
    mask = attention_mask.attention_mask if isinstance(attention_mask, MaskRequest) else attention_mask
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    if wants_weights:
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        out = torch.nn.functional.dropout(weights, dropout) @ value
        return tokens_first(out), weights
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return tokens_first(out), None


for _name, _backend in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, partial(sparse_attention_forward, backend=_backend))
    AttentionMaskInterface.register(_name, sparse_mask)
