"""Attention over disjoint sets of keys merges to that over all of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparse_hf import BlockPlan, build_plan, sparse_attention
from sparse_hf.attention import merge
from tests.attention.exactness import leaves


def test_parts_merge_to_the_whole():
    q, k, v = leaves(*[(1, 2, 100, 16)] * 3, dtype=torch.float64)
    whole = sparse_attention(q, k, v, "window(None, 0)", return_lse=True)
    near = sparse_attention(q, k, v, "window(9, 0)", return_lse=True)
    # keys further back than 9: shift the causal mask by ten keys
    far = sparse_attention(q, k[:, :, :90], v[:, :, :90], build_far_plan(), return_lse=True)
    for got, wanted in zip(merge([near, far]), whole, strict=True):
        torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(o.square().sum() + s.sum(), (q, k, v)) for o, s in (merge([near, far]), whole)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def build_far_plan() -> BlockPlan:
    # the last 90 of 90 keys cannot hold 100 queries: give the pairs as a mask over the 100 keys, cut to 90
    plan = build_plan("window(None, 0)", 100, mask_function=lambda b, h, q, k: k <= q - 10)
    return replace(plan, kv_len=90)
