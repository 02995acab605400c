"""`topk(...)` and `topk_blocks(...)` by their definition: query by query, key by key. Nothing here uses plans or backends."""

from __future__ import annotations

import torch

from sparse_hf import Pattern
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
    "window(9, 9) | topk_blocks(3, 4, 'mean', 8)": ("window(9, 9)", [("mean", 3, 4, 8)], "window(None, None)"),
    "(window(2, 0) | topk_blocks(2, 8, 'bounds', 4)) & window(None, 0)": (
        "window(2, 0) & window(None, 0)",
        [("bounds", 2, 8, 4)],
        "window(None, 0)",
    ),
    "topk_blocks(2, 16, 'antidiagonal', 16) & window(None, 0)": (
        "first(0)",
        [("antidiagonal", 2, 16, 16)],
        "window(None, 0)",
    ),
    "(window(2, 0) | vertical_slash(3, 2, 6)) & window(None, 0)": (
        "window(2, 0) & window(None, 0)",
        [("slash", 3, 2, 6)],
        "window(None, 0)",
    ),
    "window(9, 9) | topk_blocks(3, 4, 'mean', 1, 'group')": (
        "window(9, 9)",
        [("mean", 3, 4, 1, "group")],
        "window(None, None)",
    ),
    "(window(2, 0) | topk_blocks(3, 8, 'bounds', 4, 'group') | topk(4)) & window(None, 0)": (
        "window(2, 0) & window(None, 0)",
        [("bounds", 3, 8, 4, "group"), ("topk", 4)],
        "window(None, 0)",
    ),
    "topk_blocks(2, 16, 'antidiagonal', 16, 'group') & window(None, 0)": (
        "first(0)",
        [("antidiagonal", 2, 16, 16, "group")],
        "window(None, 0)",
    ),
    "first(1) | vertical_slash(2, 3, 4)": ("first(1)", [("slash", 2, 3, 4)], "window(None, None)"),
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
            share = q.shape[1] // k.shape[1] if size[-1:] == ["group"] else 1
            size = size[:2]
            if kind == "slash":
                document = real[b] & (documents[b] == documents[b, i + offset])
                last = [y for y in document.nonzero()[:, 0].tolist()[-size[-1] :] if y >= offset]
                weights = _weights(q[b, h].double(), keys[b, h], [y - offset for y in last], may[b])
                best = _slash(weights, last, (count, size[0]), i + offset, may[b, i] & ~held[b, i])
            elif kind == "topk":
                best = _keys(q[b, h, i].double(), keys[b, h], count, held[b, i], may[b, i])
            else:
                number, group = (
                    torch.where(real[b], documents[b] * length + place[b] // n, -1)
                    for n in (size[0], size[-1] if size[1:] else 1)
                )
                members = (group == group[i + offset]).nonzero()[:, 0]
                there = members[members >= offset]
                together = slice(h // share * share, (h // share + 1) * share)
                queries = q[b, together, there - offset].double(), place[b, there] % size[-1]
                begin = int(place[b, i + offset]) // size[-1] * size[-1] if size[1:] else int(place[b, i + offset])
                whole = begin + torch.arange(size[-1] if size[1:] else 1)
                is_held = Pattern.parse(plain).allows(whole[:, None], place[b]).all(0)
                # so many blocks are those of a group, or would be in a longer text
                others = count - max(1, len(whole) // size[0])
                best = _blocks(queries, keys[b, h], (kind, others), number, members, "0)" in cut, is_held, may[b, i])
            found[b, h, i, best] = True
    return found


def _keys(query, keys, count, held, may) -> list[int]:
    free = (may & ~held).nonzero()[:, 0].tolist()
    return sorted(free, key=lambda y: (-float((query @ keys[y]).float()), y))[:count]


def _blocks(queries, keys, choice, number, members, is_causal, held, may) -> list[int]:
    """The keys of a query of the group `members`, whose queries in the call are `queries` `[h, m, D]` of heads that choose together,
    with their places in the group."""
    kind, others = choice
    own, candidates = sorted(set(number[members].tolist())), {}
    # blocks of the queries' document have numbers next to their own
    for block in sorted(set(number.tolist()) - {-1, *own}):
        inside = (number == block).nonzero()[:, 0].tolist()
        is_of_document = block // len(number) == own[0] // len(number)
        if is_of_document and not held[inside].all() and not (is_causal and inside[-1] >= int(members[0])):
            candidates[block] = keys[inside]
    score = _antidiagonals if kind == "antidiagonal" else _means
    of_heads = [score(kind, head, queries[1], candidates) for head in queries[0]]
    scores = {block: float(torch.tensor(sum(one[block] for one in of_heads)).float()) for block in candidates}
    best = [*own, *sorted(scores, key=lambda block: (-scores[block], block))[: max(0, others)]]
    return [y for y in range(len(number)) if int(number[y]) in best and may[y]]


def _means(kind, queries, places, candidates) -> dict[int, float]:
    found = {}
    for block, key in candidates.items():
        low, high = queries * key.amin(0), queries * key.amax(0)
        score = queries @ key.mean(0) if kind == "mean" else torch.maximum(low, high).sum(-1)
        found[block] = float(score.mean())
    return found


def _antidiagonals(kind, queries, places, candidates) -> dict[int, float]:
    """The weights of squares of 16 x 16 pairs; each row of squares with a query has 1 for all blocks."""
    found = dict.fromkeys(candidates, 0.0)
    for row in sorted(set((places // 16).tolist())) if candidates else ():
        squares = {}
        for block, key in candidates.items():
            for column in range(-(-len(key) // 16)):
                sides = [(p, 16 * column + 15 - int(p) % 16) for p in places.tolist() if p // 16 == row]
                pairs = [(places.tolist().index(p), y) for p, y in sides if y < len(key)]
                squares[block, column] = (
                    sum(float(queries[x] @ key[y]) for x, y in pairs) / 16 * queries.shape[1] ** -0.5
                )
        weights = torch.tensor(list(squares.values()), dtype=torch.float64).softmax(0).tolist()
        for (block, _), weight in zip(squares, weights, strict=True):
            found[block] += weight
    return found


def _weights(queries, keys, last, may) -> torch.Tensor:
    """The weights `[r, K]` of the queries `last` over all keys that they may choose."""
    scores = (queries[last] @ keys.T * queries.shape[-1] ** -0.5).masked_fill(~may[last], -torch.inf)
    return scores.softmax(-1).nan_to_num()


def _slash(weights, last, counts, x, free) -> list[int]:
    """The best columns and the best distances of token x, of the keys that are `free`."""
    keys = free.nonzero()[:, 0].tolist()
    distances: dict[int, float] = {}
    for row, y in zip(weights, last, strict=True):
        for key in range(len(free)):
            distances[abs(y - key)] = distances.get(abs(y - key), 0.0) + float(row[key])
    columns = sorted(keys, key=lambda y: (-float(weights[:, y].sum().float()), y))[: counts[0]]
    by_distance = sorted(keys, key=lambda y: (-float(torch.tensor(distances.get(abs(x - y), 0.0)).float()), y))
    return columns + by_distance[: counts[1]]
