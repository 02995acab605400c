"""`lsh(...)` by its definition: bucket by bucket, query by query. Nothing here uses plans or backends."""

from __future__ import annotations

import torch

from tests import oracle

# pattern -> its part of positions, the hash, what cuts it
PATTERNS = {
    "lsh(8, 2, 16)": ("first(0)", (8, 2, 16, 0), "window(None, None)"),
    "window(9, 9) | lsh((4, 6), 3, 5, 1)": ("window(9, 9)", ((4, 6), 3, 5, 1), "window(None, None)"),
    "(window(5, 0) | lsh(4, 2, 8)) & window(None, 0)": ("window(5, 0)", (4, 2, 8, 0), "window(None, 0)"),
    "lsh(8, 2) & stride(3) | first(2)": ("first(2)", (8, 2, 64, 0), "stride(3)"),
}


def mask_of(text: str, q, k, data) -> torch.Tensor:
    """The pairs `[B, H, Q, K]` of one of `PATTERNS`; `data` holds what is `real` and the `documents`, or None."""
    batch, length, real, documents = q.shape[0], k.shape[2], data["real"], data["documents"]
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    documents = torch.zeros(batch, length, dtype=torch.long) if documents is None else documents
    plain, values, cut = PATTERNS[text]
    plain, cut = (oracle.dense_mask(p, q.shape[2], length, real, documents) for p in (plain, cut))
    return plain | defined_pairs(q, k, values, real, documents) & cut


def defined_pairs(q, k, values, real, documents) -> torch.Tensor:
    """`[B, H, Q, K]`, from the definition: bucket by bucket, query by query."""
    buckets, rounds, size, seed = values
    factors = (buckets,) if isinstance(buckets, int) else buckets
    batch, heads, queries, _ = q.shape
    groups, length = k.shape[1:3]
    rotations = torch.randn(
        groups, q.shape[-1] + 1, rounds, sum(factors) // 2, generator=torch.Generator().manual_seed(seed)
    )
    held = torch.zeros(batch, heads, queries, length, dtype=torch.bool)

    def bucket(vector, directions):
        found = []
        for part in (vector @ directions).split([f // 2 for f in factors]):
            found.append(int(torch.cat([part, -part]).argmax()))
        return tuple(found)

    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for r in range(rounds):
                longest, of_key = {}, []
                for y in range(length):
                    key, document = k[b, g, y].float(), int(documents[b, y])
                    norm = key.norm()
                    if real[b, y]:
                        longest[document] = max(longest.get(document, norm), norm)
                    top = longest.get(document, norm)
                    augmented = torch.cat([key / top, (1 - (norm / top) ** 2).clamp(min=0).sqrt()[None]])
                    of_key.append(bucket(augmented, rotations[g, :, r]))
                for i in range(queries):
                    x = i + length - queries
                    mine = bucket(torch.cat([q[b, h, i].float(), torch.zeros(1)]), rotations[g, :, r])
                    alike = [
                        y for y in range(length)
                        if real[b, x] and real[b, y] and documents[b, y] == documents[b, x] and of_key[y] == mine
                    ]  # fmt: skip
                    past, future = [y for y in alike if y <= x], [y for y in alike if y > x]
                    held[b, h, i, past[-size:] + future[:size]] = True
    return held
