"""`attend_chosen`: exact attention over the keys that an index names for each query.

Legend: B batch, H query heads, G key heads (G divides H), Q queries, K keys, D head dim, E head dim of values; C heads of the
choice, N keys that are chosen for a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import NOTHING
from ..autograd import attend
from ..backend import AttentionCall, Backend
from ..dropout import Dropout
from ..merge import with_sink
from ..operator import has_no_content, register
from ..scoring import Scoring
from .backend import GatheredKeys
from .choice import ChosenKeys

GATHERED_KEYS = GatheredKeys()


def attend_chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys that are chosen for it, and no others, in memory O(Q N).

    Differentiable in query, key, value and sinks. The kernels and the CPU give the same bits in every run. A query without any key gives 0
    and lse -inf, with zero gradient. A key that is named twice counts twice.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, G, K, D]`; G divides H, and query head h reads key head `h // (H / G)`.
        value: `[B, G, K, E]`; E may differ from D.
        chosen: `[B, C, Q, N]` int32 or int64 with C one of 1, G and H: the keys of each query, by index; below 0 is none. B
            may be 1.
        scale: what multiplies `query @ key`; by default `D ** -0.5`.
        sinks: `[H]`, a logit for each head that takes its share of the weight and has no value.
        soft_cap: a score x becomes `soft_cap * tanh(x / soft_cap)`.
        dropout: probability with which an attention weight is dropped. The caller decides whether it is training.

    Returns:
        out `[B, H, Q, E]` in the dtype of query, and lse `[B, H, Q]` of the scores of keys, without the sink, in float32
        (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an index that is no key (on a GPU, where looking
            would make the host wait, it is no key without an error).

    Examples:
        >>> query = key = value = torch.randn(1, 4, 300, 32)
        >>> chosen = torch.randint(300, (1, 1, 300, 16))
        >>> attend_chosen(query, key, value, chosen)[0].shape
        torch.Size([1, 4, 300, 32])
    """
    _check(query, key, value, chosen)
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}; it must be [{query.shape[1]}], one for each query head"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")
    scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else float(scale), soft_cap)
    scoring.check(query.shape[1], 0, 0)
    drop = Dropout.draw(dropout)
    if has_no_content(query):
        out, lse = _between_graphs(query, key, value, chosen, drop.seed, scoring.scale, soft_cap, dropout)
    else:
        if chosen.device.type == "cpu" and chosen.numel() and int(chosen.max()) >= key.shape[2]:
            raise ValueError(f"chosen names key {int(chosen.max())}; there are {key.shape[2]} keys")
        out, lse = attend(chosen_call(query, key, value, chosen, scoring, drop), GATHERED_KEYS)
    return out if sinks is None else with_sink(out, lse, sinks), lse


def chosen_call(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scoring: Scoring, dropout: Dropout
) -> AttentionCall:
    """The call of attention over chosen keys."""
    return AttentionCall(query, key, value, None, 0, scoring, dropout, NOTHING, chosen_plan=ChosenKeys(chosen))


def _prepare(
    recorded: bool, query, key, value, chosen, seed, scale, soft_cap, dropout
) -> tuple[AttentionCall, Backend]:
    call = chosen_call(query, key, value, chosen, Scoring(scale, soft_cap), Dropout(dropout, seed))
    call.recorded = recorded
    return call, GATHERED_KEYS


_between_graphs, _ = register(
    "chosen_attention",
    _prepare,
    "Tensor query, Tensor key, Tensor value, Tensor chosen, Tensor? seed",
    "float scale, float? soft_cap, float dropout",
)


def _check(query: Tensor, key: Tensor, value: Tensor, chosen: Tensor) -> None:
    named = {"query": query, "key": key, "value": value, "chosen": chosen}
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named.items())
    if any(t.ndim != 4 for t in named.values()):
        raise ValueError(f"{shapes}: each must have four dimensions, [batch, heads, length, ...]")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"{shapes}: batch, key heads, key length and head dim of query and key must agree")
    heads, groups = query.shape[1], key.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"{shapes}: {groups} key heads do not divide {heads} query heads")
    if chosen.shape[1] not in (1, groups, heads):
        raise ValueError(f"{shapes}: chosen must have 1, {groups} or {heads} heads")
    if chosen.shape[0] not in (1, query.shape[0]) or chosen.shape[2] != query.shape[2]:
        raise ValueError(f"{shapes}: chosen must have the batch and the length of query")
    if chosen.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"chosen is {chosen.dtype}; it must be int32 or int64")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype} must agree and be floating point")
    if not query.device == key.device == value.device == chosen.device:
        raise ValueError(f"devices {', '.join(str(t.device) for t in named.values())} of {', '.join(named)} must agree")
