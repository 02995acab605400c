"""The one place where sparse attention meets Transformers: its attention and mask interfaces.

Each of our names is registered in both. The mask function hands on what it was told (`MaskRequest`), untouched, and the
attention function takes the layer's pattern from the configuration. What a query may see is the pattern AND the model's
own mask AND padding: a pattern can only remove pairs.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ...attention import attend, attention, hashed_weights, route, uses_hashes, with_weights
from ...attention.backend import AttentionCall
from ...attention.dropout import Dropout
from ...attention.scoring import Scoring
from ...pattern import Pattern
from ...plan import BatchInfo, BlockPlan, build_plan, of_batch
from .config import IMPLEMENTATIONS, past
from .streaming_cache import StreamingCache
from .tensor_parallel import own_heads

# arguments of other models' attention that would change the scores: refused rather than ignored
UNSUPPORTED = ("s_aux",)


@dataclass(frozen=True)
class StackFacts:
    """What the layers of a stack share: its name, its heads, and the pattern of each layer before it is cut to the past."""

    name: str
    heads: int
    patterns: list[str]


@dataclass(eq=False)
class MaskRequest:
    """What the model asked its mask function for, once for all layers of a forward pass.

    Layers find here what they share: `memo` holds the batch data in the form that plans want.
    """

    attention_mask: Tensor | None  # [B, K] bool, true on real tokens
    mask_function: Callable | None
    q_offset: int | Tensor
    memo: dict = field(default_factory=dict)

    def to(self, device) -> MaskRequest:
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return MaskRequest(mask, self.mask_function, self.q_offset)

    def stack(self, module: Any) -> StackFacts:
        """The stack of an attention module. A configuration is slow to answer, so it is asked once a pass."""
        config, is_decoder = module.config, module.__dict__.get("is_decoder", False)
        own = id(config), is_decoder
        found = self.memo.get(own)
        if found is None:
            name = _stack(module)
            found = StackFacts(name, config.heads_of(name), config.layer_patterns(name))
            if not torch.compiler.is_compiling():
                self.memo[own] = found
        return found

    def batch(self, position_ids: Tensor | None, marks: Tensor | None, query: Tensor, key: Tensor) -> BatchInfo:
        """Padding, documents and marks, made once for layers that hand over the same tensors."""
        if torch.compiler.is_compiling():
            documents = _documents(position_ids, self.attention_mask, query, key)
            return of_batch(self.attention_mask, documents, _marks(marks, query, key))
        own = id(position_ids), id(marks), query.shape[2], key.shape[2], query.device
        if own not in self.memo:
            documents = _documents(position_ids, self.attention_mask, query, key)
            found = of_batch(self.attention_mask, documents, _marks(marks, query, key))
            # the tensors are kept, so that no other gets their numbers
            self.memo[own] = found, position_ids, marks
        return self.memo[own][0]


def sparse_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    **_,
) -> MaskRequest:
    """What Transformers calls once per forward pass, with keywords."""
    if not isinstance(kv_offset, int) or kv_offset:
        raise NotImplementedError(
            "the cache has dropped keys of its own accord (a sliding cache); use a DynamicCache, of which sparse attention "
            "reads only the keys that its pattern holds, or a StreamingCache, which drops what no pattern holds"
        )
    if attention_mask is not None and attention_mask.shape[-1] != kv_length:
        short = kv_length - attention_mask.shape[-1]
        attention_mask = torch.nn.functional.pad(attention_mask, (0, short), value=False)
    if attention_mask is not None and attention_mask.is_meta:
        # dense models refuse a mask without content, since they ask whether it pads anything; a sparse one is to behave alike
        bool(attention_mask.all())
    if isinstance(q_offset, Tensor):
        # a static cache gives its own counter, which it moves on before the attention function looks
        q_offset = q_offset.clone() if torch.compiler.is_compiling() else int(q_offset)
    return MaskRequest(attention_mask, mask_function, q_offset)


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
    unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported:
        raise NotImplementedError(
            f"{type(module).__name__} passes {unsupported}, which sparse attention does not compute"
        )
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage] - documented there
        raise NotImplementedError(
            "torch.jit.trace would keep the mask of the example for every later text; use torch.compile or torch.export "
            "(torch.onnx.export with dynamo=True)"
        )
    query, key, value = _of_autocast(query, key, value)
    request = _as_request(attention_mask, query, key)
    stack = request.stack(module)
    bias = kwargs.get("position_bias")
    bias = None if bias is None or not bias.numel() else bias
    # the reference makes the n x n weights anyway, and whether somebody records them is not said here
    wants_weights = backend == "reference" and not torch.compiler.is_compiling()
    crosses = kwargs.get("is_cross_attention")
    if _crosses(module, stack.name) if crosses is None else crosses:
        assert bias is None
        return _cross_attention(query, key, value, attention_mask, scaling, dropout, wants_weights)
    is_causal, opaque = _reading(request.mask_function, kwargs.get("is_causal", getattr(module, "is_causal", False)))
    pattern = _layer_pattern(module, stack, is_causal)
    if kwargs.get("streaming_cache") is not None:
        _check_streaming(kwargs["streaming_cache"], module.layer_idx, pattern, opaque)
        request = _of_held(request, kwargs["streaming_cache"], query, key)
    if query.shape[1] != stack.heads:
        pattern = own_heads(pattern, module, query.shape[1], stack.heads)
    # of an encoder-decoder, the encoder's tokens are marked
    marks = None if stack.name == "decoder" else kwargs.get("global_attention_mask")
    positions = kwargs.get("document_positions", kwargs.get("position_ids"))
    batch = request.batch(positions, marks, query, key)
    q_offset = int(request.q_offset)
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"), bias)
    call = AttentionCall(query, key, value, pattern, q_offset, scoring, Dropout.draw(dropout), batch, wants_lse=False)
    weights = None
    if wants_weights or opaque is not None:
        call.pattern = Pattern.parse(pattern)
        if opaque is not None:
            call.chosen_plan = _opaque_plan(call, opaque)
        if not wants_weights:
            out, _ = attend(call, route(call, backend))
        elif uses_hashes(pattern) and opaque is None:
            out, _, weights = hashed_weights(call)
        else:
            out, _, weights = with_weights(call)
    else:
        if not scoring.is_plain:
            scoring.check(query.shape[1], q_offset + query.shape[2] - 1, key.shape[2])
        out, _ = attention(call, backend)
    return out.transpose(1, 2).contiguous(), weights


def _of_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast gives SDPA: rotary positions leave queries and keys in float32 beside values in bfloat16."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, dropout: float, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The output `[B, H, Q, D]` of a plan, and the weights `[B, H, Q, K]` on the way to it. O(n^2)."""
    scoring = Scoring(q.shape[-1] ** -0.5 if scale is None else scale)
    call = AttentionCall(q, k, v, None, plan.q_offset, scoring, Dropout.draw(dropout), chosen_plan=plan)
    out, _, weights = with_weights(call)
    return out, weights


def _stack(module) -> str:
    """The row of layers that an attention module belongs to, as `config.stacks` names it."""
    return "" if "" in module.config.stacks else "decoder" if module.is_decoder else "encoder"


def _layer_pattern(module: Any, stack: StackFacts, is_causal: bool) -> str:
    """The text of a layer's pattern, cut to the past if the model is causal."""
    # layers that share their weights do not know which they are
    layer = module.__dict__.get("layer_idx") or 0
    if layer >= len(stack.patterns):
        return module.config.layer_pattern(layer, is_causal, stack.name)
    return past(stack.patterns[layer]) if is_causal else stack.patterns[layer]


def _crosses(module, stack: str) -> bool:
    """Does a module attend to another sequence? Its cost is linear in that sequence, and it stays dense."""
    kind = type(module)
    if kind.__name__.endswith("CrossAttention") or module.__dict__.get("is_cross_attention", False):
        return True
    return stack == "decoder" and not module.is_causal


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
    assert isinstance(call.pattern, Pattern)
    return build_plan(
        call.pattern, call.q.shape[2], call.k.shape[2], q_offset=call.q_offset, key_padding_mask=padding,
        segment_ids=segments, marks=marks, mask_function=mask_function, device=call.k.device,
    )  # fmt: skip


def _as_request(attention_mask, query: Tensor, key: Tensor) -> MaskRequest:
    if isinstance(attention_mask, MaskRequest):
        return attention_mask
    q_offset = key.shape[2] - query.shape[2]
    if attention_mask is None:
        return MaskRequest(None, None, q_offset)
    return MaskRequest(None, partial(_explicit_mask, _as_bool(attention_mask, query, key), q_offset), q_offset)


def _of_held(request: MaskRequest, cache: StreamingCache, query: Tensor, key: Tensor) -> MaskRequest:
    """The request in numbers of the keys that a cache holds: its first, its last, and the queries' own behind them."""
    held = key.shape[2]
    return MaskRequest(cache.real(held, key.device), request.mask_function, held - query.shape[2])


def _check_streaming(cache: StreamingCache, layer: int, pattern: str, opaque: Callable | None) -> None:
    """Does a cache that drops keys hold all that a layer sees?"""
    if opaque is not None:
        raise NotImplementedError(
            "a mask function that sparse_hf does not know may speak of keys that a StreamingCache drops; use a DynamicCache"
        )
    if pattern != cache.patterns[layer]:
        raise ValueError(
            f"the StreamingCache keeps what {cache.patterns[layer]} sees, and the pattern of layer {layer} is {pattern}; make it of "
            "this model's own configuration, StreamingCache(model.config)"
        )


def _as_bool(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A `[B or 1, 1, Q, K]` mask that the user made: bool (true: may see) or additive (0: may see)."""
    expected = (query.shape[2], key.shape[2])
    if mask.ndim != 4 or mask.shape[1] != 1 or tuple(mask.shape[2:]) != expected:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; a 4-D mask must be [batch, 1, {expected[0]}, {expected[1]}]"
        )
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not (allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ValueError(
            "a 4-D attention_mask that adds other values than 0 and -inf is a bias, which is not supported"
        )
    return allowed


def _explicit_mask(mask: Tensor, q_offset: int, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return mask[b if mask.shape[0] > 1 else torch.zeros_like(b), 0, q - q_offset, k]


def _reading(mask_function: Callable | None, module_is_causal: bool) -> tuple[bool, Callable | None]:
    """Is the mask causal, and what of it must be evaluated element by element (None: nothing)?"""
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    # models build overlays of their own only for packing, which positions tell us; a graph cannot look into closures
    if mask_function is None or torch.compiler.is_compiling():
        return bool(module_is_causal), None
    leaves = list(_leaves(mask_function))
    if all(getattr(leaf, "__qualname__", "") in KNOWN for leaf in leaves):
        return any(leaf is causal_mask_function for leaf in leaves), None
    return False, mask_function


# mask functions whose pairs are known otherwise: packing from positions, a sliding window of the family from its pattern
KNOWN = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
}
COMBINATORS = ("and_masks.<locals>.and_mask", "remap_positions_for_packed_sequence.<locals>.inner_mask")


def _leaves(mask_function: Callable) -> Iterator[Callable]:
    """The mask functions that Transformers joined into this one."""
    if getattr(mask_function, "__qualname__", "") not in COMBINATORS:
        yield mask_function
        return
    for cell in mask_function.__closure__ or ():
        inner = cell.cell_contents
        for part in inner if isinstance(inner, tuple) else (inner,):
            if callable(part):
                yield from _leaves(part)


def _documents(position_ids: Tensor | None, attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Number the packed documents `[B, K]`: one begins where positions stop growing. Whole sequences only (no cache)."""
    if (
        position_ids is None
        or position_ids.ndim != 2
        or position_ids.shape[1] != key.shape[2]
        or query.shape[2] != key.shape[2]
    ):
        return None
    previous = position_ids[:, :-1]
    if attention_mask is not None:
        # compare with the last real token: padding repeats positions
        index = torch.arange(key.shape[2], device=key.device).expand_as(attention_mask)
        last_real = torch.where(attention_mask, index, 0).cummax(1).values
        previous = position_ids.expand_as(attention_mask).gather(1, last_real[:, :-1])
    restarts = position_ids[:, 1:] <= previous
    if attention_mask is not None:
        restarts = restarts & attention_mask[:, 1:]
    if not torch.compiler.is_compiling() and not restarts.any():
        return None
    documents = torch.nn.functional.pad(restarts.long().cumsum(1), (1, 0))
    return documents.expand(key.shape[0], -1)


def _marks(global_attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if global_attention_mask is None:
        return None
    # multiple choice gives [batch, choices, K]
    marks = global_attention_mask.reshape(-1, global_attention_mask.shape[-1])
    if marks.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"global_attention_mask has shape {tuple(global_attention_mask.shape)}; it must cover all {key.shape[2]} keys of "
            f"{key.shape[0]} rows, those in the cache included"
        )
    return marks.to(device=key.device, dtype=torch.bool)


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
        return out.transpose(1, 2).contiguous(), weights
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


for _name, _backend in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, partial(sparse_attention_forward, backend=_backend))
    AttentionMaskInterface.register(_name, sparse_mask)
