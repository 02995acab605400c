"""`attend_latent` against dense attention in float64 over the keys and values that the latents make."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.attention.chosen import attend_latent, latent
from sparse_hf.attention.chosen.latent import Latents
from tests.attention.chosen.test_attend import dense
from tests.attention.exactness import DEVICE


def drawn(dtype, heads=6, queries=5, keys=20, chosen=9, latent_dim=24, turned=8, batch=2):
    """Queries, latents in `dtype`, a choice, and what it should come to."""
    shapes = (batch, heads, queries, 12 + turned), (batch, keys, latent_dim), (batch, keys, turned)
    shapes = *shapes, (heads, 12, latent_dim), (heads, 10, latent_dim)
    query, *parts = ((torch.randn(shape, dtype=torch.float64) / 2).to(dtype) for shape in shapes)
    index = torch.rand(batch, 1, queries, keys).argsort(-1)[..., :chosen]
    index = index.where(torch.rand(index.shape) < 0.8, -1)
    index[0, 0, 0] = -1
    exact = dense(index, heads, keys, scale=0.3)(
        query.double(), *Latents(*(t.double() for t in parts)).keys_and_values()
    )[0]
    return query, Latents(*parts), index, exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_dense_attention(dtype):
    query, latents, index, exact = drawn(dtype)
    torch.testing.assert_close(attend_latent(query, latents, index, scale=0.3).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("heads", [6, 40])
def test_kernel_equals_dense_attention(heads, monkeypatch):
    monkeypatch.setattr(latent, "MAX_PROJECTED", 2 * heads * 24 * 2)
    monkeypatch.setattr(latent, "HEADS", 16)
    monkeypatch.setattr(latent, "KEYS", 16)
    query, latents, index, exact = drawn(torch.float16, heads)
    query, index = query.to(DEVICE), index.to(DEVICE)
    latents = Latents(*(t.to(DEVICE) for t in (latents.latent, latents.turned, latents.up_key, latents.up_value)))
    assert latent.why_not(query, latents) is None
    found = attend_latent(query, latents, index, scale=0.3).cpu().double()
    torch.testing.assert_close(found, exact, rtol=5e-3, atol=5e-3)
    assert not found[0, :, 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_latents_of_published_widths_on_a_gpu(dtype):
    query, latents, index, _ = drawn(dtype, 128, 40, 300, 200, 512, 64, batch=1)
    parts = latents.latent, latents.turned, latents.up_key, latents.up_value
    key, value = Latents(*(t.double() for t in parts)).keys_and_values()
    exact = dense(index, 128, 300, scale=0.02)(query.double(), key, value)[0]
    found = attend_latent(query.cuda(), Latents(*(t.cuda() for t in parts)), index.cuda(), scale=0.02).cpu().double()
    assert float((found - exact).norm() / exact.norm()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_gradients():
    query, latents, index, _ = drawn(torch.float64)
    parts = latents.latent, latents.turned, latents.up_key, latents.up_value
    leaves = [t.requires_grad_() for t in (query, *parts)]

    def exact(query, *parts):
        return dense(index, 6, 20, scale=0.3)(query, *Latents(*parts).keys_and_values())[0]

    def ours(query, *parts):
        return attend_latent(query, Latents(*parts), index, scale=0.3)

    found = (torch.autograd.grad(attend(*leaves).square().sum(), leaves) for attend in (exact, ours))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
