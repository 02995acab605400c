"""`attend_latent` against dense attention in float64 over the keys and values that the latents make."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.attention.chosen import attend_latent, latent, latent_passes
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


def in_small_tiles(monkeypatch, heads):
    """Two queries at a time forward, and two backward."""
    monkeypatch.setattr(latent_passes, "MAX_PROJECTED", 2 * heads * 24 * 2)
    monkeypatch.setattr(latent_passes, "MAX_ADDED", 2 * 9 * 32)
    for name in ("HEADS", "KEYS", "GRADIENT_KEYS"):
        monkeypatch.setattr(latent_passes, name, 16)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("heads", [6, 40])
def test_kernel_equals_dense_attention(heads, monkeypatch):
    in_small_tiles(monkeypatch, heads)
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


def gradients(attend, query, latents, index, scale, weight):
    """Of the sum of an output times `weight`."""
    parts = latents.latent, latents.turned, latents.up_key, latents.up_value
    leaves = [t.detach().clone().requires_grad_() for t in (query, *parts)]
    out = attend(leaves[0], Latents(*leaves[1:]), index, scale)
    return torch.autograd.grad((out * weight.to(out)).sum(), leaves)


def by_dense(query, latents, index, scale):
    return dense(index, query.shape[1], latents.latent.shape[1], scale=scale)(query, *latents.keys_and_values())[0]


def ours(query, latents, index, scale):
    return attend_latent(query, latents, index, scale=scale)


def in_doubles(latents):
    return Latents(*(t.double() for t in (latents.latent, latents.turned, latents.up_key, latents.up_value)))


def test_gradients():
    query, latents, index, exact = drawn(torch.float64)
    weight = torch.randn_like(exact)
    wanted, found = (gradients(attend, query, latents, index, 0.3, weight) for attend in (by_dense, ours))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("heads", "shares"), [(6, False), (40, False), (6, True)])
def test_gradients_of_the_kernels(heads, shares, monkeypatch):
    in_small_tiles(monkeypatch, heads)
    query, latents, index, exact = drawn(torch.float16, heads)
    # a choice that rows of the batch share, and one that a text ends within
    index = index[:1] if shares else index
    weight = torch.randn_like(exact) / 4
    wanted = gradients(by_dense, query.double(), in_doubles(latents), index.expand(2, -1, -1, -1), 0.3, weight)
    on_device = Latents(*(t.to(DEVICE) for t in (latents.latent, latents.turned, latents.up_key, latents.up_value)))
    given = query.to(DEVICE), on_device, index.to(DEVICE), 0.3, weight.to(DEVICE)
    assert latent.why_not(*given[:2]) is None
    found, again = gradients(ours, *given), gradients(ours, *given)
    for one, other, right in zip(found, again, wanted, strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float16
        assert float((one.cpu().double() - right).norm() / right.norm()) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_published_widths_on_a_gpu(dtype, monkeypatch):
    monkeypatch.setattr(latent_passes, "MAX_ADDED", 15 * 200 * 576)
    query, latents, index, exact = drawn(dtype, 128, 40, 300, 200, 512, 64, batch=1)
    weight = torch.randn_like(exact)
    wanted = gradients(by_dense, query.double(), in_doubles(latents), index, 0.02, weight)
    on_device = Latents(*(t.cuda() for t in (latents.latent, latents.turned, latents.up_key, latents.up_value)))
    given = query.cuda(), on_device, index.cuda(), 0.02, weight.cuda()
    found, again = gradients(ours, *given), gradients(ours, *given)
    for one, other, right in zip(found, again, wanted, strict=True):
        assert torch.equal(one, other)
        assert float((one.cpu().double() - right).norm() / right.norm()) < (2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.usefixtures("interpreted")
def test_a_second_derivative_is_refused():
    query, latents, index, _ = drawn(torch.float16)
    query = query.to(DEVICE).requires_grad_()
    on_device = Latents(*(t.to(DEVICE) for t in (latents.latent, latents.turned, latents.up_key, latents.up_value)))
    out = attend_latent(query, on_device, index.to(DEVICE), scale=0.3)
    with pytest.raises(
        RuntimeError, match="attention over chosen latents has no second derivative; call autograd without"
    ):
        torch.autograd.grad(out.sum(), query, create_graph=True)
