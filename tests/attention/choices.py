"""`topk(...)` and `topk_blocks(...)` by their definition: query by query, key by key. Nothing here uses plans or backends."""

from __future__ import annotations

import torch

from tests import oracle

# pattern -> its part of positions, what chooses, what cuts it
PATTERNS = {
    "topk(7)": ("first(0)", [("topk", 7)], "window(None, None)"),
    "window(9, 9) | topk(5)": ("window(9, 9)", [("topk", 5)], "window(None, None)"),
    "(window(5, 0) | first(2) | topk(6)) & window(None, 0)": (
        "(window(5, 0) | first(2)) & window(None, 0)",
        [("topk", 6)],
        "window(None, 0)",
    ),
    "topk(9) & stride(3) | first(2)": ("first(2)", [("topk", 9)], "stride(3)"),
    "window(9, 9) | topk_blocks(3, 4)": ("window(9, 9)", [("mean", 3, 4)], "window(None, None)"),
    "topk_blocks(4, 8, 'bounds') & window(None, 0)": ("first(0)", [("bounds", 4, 8)], "window(None, 0)"),
    "(window(5, 0) | topk_blocks(3, 8) | topk(4)) & window(None, 0)": (
        "window(5, 0) & window(None, 0)",
        [("mean", 3, 8), ("topk", 4)],
        "window(None, 0)",
    ),
}


def mask_of(text: str, q, k, data) -> torch.Tensor:
    """The pairs `[B, H, Q, K]` of one of `PATTERNS`; `data` holds what is `real` and the `documents`, or None."""
    batch, length, real, documents = q.shape[0], k.shape[2], data["real"], data["documents"]
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    documents = torch.zeros(batch, length, dtype=torch.long) if documents is None else documents
    plain, choices, cut = PATTERNS[text]
    held, may = (oracle.dense_mask(p, q.shape[2], length, real, documents)[:, 0] for p in (plain, cut))
    found = held[:, None].repeat(1, q.shape[1], 1, 1)
    place, offset = oracle.positions(real, documents), length - q.shape[2]
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        if not real[b, i + offset]:
            continue
        for kind, count, *size in choices:
            mine = held[b, i], may[b, i]
            if kind == "topk":
                best = _keys(q[b, h, i].double(), keys[b, h], count, *mine)
            else:
                number = torch.where(real[b], documents[b] * length + place[b] // size[0], -1)
                best = _blocks(q[b, h, i].double(), keys[b, h], (kind, count), number, i + offset, "0)" in cut, *mine)
            found[b, h, i, best] = True
    return found


def _keys(query, keys, count, held, may) -> list[int]:
    free = (may & ~held).nonzero()[:, 0].tolist()
    return sorted(free, key=lambda y: (-float((query @ keys[y]).float()), y))[:count]


def _blocks(query, keys, choice, number, x, is_causal, held, may) -> list[int]:
    kind, count = choice
    own, scores = int(number[x]), []
    # blocks of the query's document have numbers next to its own
    for block in sorted(set(number.tolist()) - {-1, own}):
        inside = (number == block).nonzero()[:, 0].tolist()
        if block // len(number) != own // len(number) or (is_causal and inside[-1] >= x) or held[inside].all():
            continue
        key = keys[inside]
        low, high = query * key.amin(0), query * key.amax(0)
        score = query @ key.mean(0) if kind == "mean" else torch.maximum(low, high).sum()
        scores.append((-float(score.float()), block))
    best = [own, *(block for _, block in sorted(scores)[: count - 1])]
    return [y for y in range(len(number)) if int(number[y]) in best and may[y]]
