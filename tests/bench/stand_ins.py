"""What fla-core 0.6.0 and lsg-converter 0.1.9 compute, dense, with a mask.

Signatures are theirs.
"""

from __future__ import annotations

import torch
from torch import nn


def _attend(q, k, v, held, scale=None):
    """Attend to the pairs of each key head, `held` `[G or 1, n, n]`.

    q, k and v have heads before tokens.
    """
    held = held.repeat_interleave(q.shape[1] // held.shape[0], 0)[None]
    return nn.functional.scaled_dot_product_attention(q, k, v, held, scale=scale, enable_gqa=True)


def _heads_first(*tensors):
    return [t.transpose(1, 2) for t in tensors]


def parallel_nsa(
    q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16, block_size=64, window_size=0,
    scale=None, cu_seqlens=None,
):  # fmt: skip
    batch, n, heads, kv_heads = *q.shape[:3], k.shape[2]
    group, most = heads // kv_heads, block_indices.shape[-1]
    assert group >= 16 and group & (group - 1) == 0 and most & (most - 1) == 0 and block_size & (block_size - 1) == 0
    assert block_indices.shape == (batch, n, kv_heads, most) and block_counts.shape == (batch, n, kv_heads)
    assert block_indices.is_contiguous() and block_counts.is_contiguous() and (g_cmp, window_size) == (None, 0)
    # its forward stops at the count and its lists for the backward do too
    blocks = block_indices.masked_fill(torch.arange(most) >= block_counts[..., None], -1)
    place = torch.arange(n)
    listed = (blocks[0].transpose(0, 1)[:, :, None] == (place // block_size)[:, None]).any(-1)  # [G, n, n]
    return _attend(*_heads_first(q, k, v), listed & (place <= place[:, None]), scale).transpose(1, 2)


def parallel_moba(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk):
    n = q.shape[1]
    assert q.shape == k.shape and cu_seqlens.tolist() == [0, n] and max_seqlen == n > chunk_size and topk > 1
    q, k, v = _heads_first(q, k, v)
    place = torch.arange(n)
    chunk = place // chunk_size
    # its last chunk is chosen by nobody
    means = torch.stack([k[:, :, chunk == one].mean(2) for one in range(int(chunk[-1]))], 2).float()
    gate = q.float() @ means.mT
    gate = gate.masked_fill(torch.arange(means.shape[2]) >= chunk[:, None], -torch.inf)
    best = gate.topk(min(topk - 1, means.shape[2]), dim=-1)
    listed = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best.indices, best.values > -torch.inf)
    listed = torch.nn.functional.pad(listed, (0, 1))[0][:, :, chunk]
    held = (listed | (chunk == chunk[:, None])) & (place <= place[:, None])
    return _attend(q, k, v, held).transpose(1, 2)


class LSGSelfAttention(nn.Module):
    def __init__(
        self, config=None, block_size=128, sparsity_factor=8, sparsity_type=None, compute_global_attention=True,
        is_causal=False, attention_dropout_prob=0.1, preprocessing_function=None,
    ):  # fmt: skip
        super().__init__()
        assert sparsity_type is None and attention_dropout_prob == 0
        self.block_size, self.first, self.is_causal = block_size, compute_global_attention, is_causal

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, **kwargs):
        assert query_layer.shape == key_layer.shape and attention_mask is None
        place = torch.arange(query_layer.shape[2])
        q, k = place[:, None], place
        held = (k // self.block_size - q // self.block_size).abs() <= 1
        if self.first:
            held |= (q == 0) | (k == 0)
        return _attend(query_layer, key_layer, value_layer, (held & (k <= q) if self.is_causal else held)[None])
