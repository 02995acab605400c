"""The one autograd node: what it saves, where hooks find it, and second derivatives."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import sparse_hf
from sparse_hf import sparse_attention
from sparse_hf.attention import BACKENDS, attend, merge
from sparse_hf.attention.autograd import AutogradBackend
from sparse_hf.attention.backend import Given
from sparse_hf.attention.dispatch import DECODE, DENSE
from sparse_hf.attention.hashed.reformer import chunked_attention
from sparse_hf.models.longformer import rows
from sparse_hf.parallel import exchange
from sparse_hf.plan.hash_order import Chunking
from sparse_hf.train import distillation
from tests import oracle
from tests.attention.exactness import DEVICE, FP32, call_of, tensors, why_not
from tests.models import reformers

# each of them other kernels: (pattern, queries, what else is given)
CALLS = {
    "blocks": ("window(20, 20) | first(2)", 200, {"return_lse": True}),
    "bias and cap": ("window(20, 20)", 200, {"relative_bias": torch.ones(4, 399), "softcap": 3.0}),
    "strided": ("stride(7) | window(5, 0)", 200, {}),
    "hashes": ("window(5, 0) | lsh(4, 2, 8)", 200, {}),
    "choices": ("window(5, 0) | topk(8)", 200, {}),
    "dense": ("window(None, 0)", 200, {}),
    "decode": ("window(20, 0)", 20, {}),
    "decode, ranges": ("window(20, 0) | first(3)", 20, {}),
    "marks": ("window(9, 9) | marked()", 200, {"marks": torch.arange(200).expand(2, -1) % 50 == 3}),
    "reference": ("window(20, 20)", 200, {"backend": "reference"}),
}


def drawn(queries: int) -> list[torch.Tensor]:
    """As layers make them: nobody else holds them."""
    return [t.requires_grad_() * 1 for t in tensors((4, 2, 16), queries, 200, FP32)]


@pytest.mark.parametrize("name", CALLS)
def test_hooks_are_given_all_that_is_saved(name):
    """Checkpointing and offloading replace what is saved, and free it."""
    pattern, queries, how = CALLS[name]
    q, k, v = drawn(queries)
    storages = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    held = [weakref.ref(t) for t in (q, k, v)] + [StorageWeakRef(t.untyped_storage()) for t in (q, k, v)]
    packed = set()

    def pack(t: torch.Tensor) -> torch.Tensor:
        packed.add(t.untyped_storage().data_ptr())
        return t.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = sparse_attention(q, k, v, pattern, **how)
    if name == "reference":
        # it saves copies in the dtype that it computes in
        assert packed
    else:
        assert storages <= packed
    leaf = q.grad_fn
    del q, k, v
    gc.collect()
    assert all(ref.expired() if isinstance(ref, StorageWeakRef) else ref() is None for ref in held)
    assert leaf is not None
    (found[0] if isinstance(found, tuple) else found).sum().backward()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_the_same(name, dropout):
    pattern, queries, how = CALLS[name]
    how = {**how, "dropout": dropout, "return_lse": True}
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 16), queries, 200, torch.float64))

    def function(q, k, v):
        return sparse_attention(
            q, k, v, pattern, **{n: t.double() if n == "relative_bias" else t for n, t in how.items()}
        )

    torch.manual_seed(3)
    wanted = oracle.gradients(function, q, k, v)
    torch.manual_seed(3)
    found = oracle.gradients(lambda *t: checkpoint(function, *t, use_reentrant=False), q, k, v)
    assert all(map(torch.equal, found, wanted))


# the interpreter of kernels takes seconds for each pattern
@pytest.mark.cross(by=lambda backend, pattern: [backend if backend == "triton" else (backend, pattern)])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if not isinstance(BACKENDS[name], AutogradBackend)])
@pytest.mark.parametrize(
    "pattern",
    ["window(5, 5) | first(2)", "stride(3) | window(2, 0)", "window(3, 0) | lsh(4, 2, 8)", "first(1) | topk(6)"],
)
def test_a_second_derivative_is_refused(backend, pattern, request, monkeypatch):
    monkeypatch.setattr("sparse_hf.plan.strided.MIN_GAIN", 0)
    if backend == "triton":
        request.getfixturevalue("interpreted")
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 16), 40, 40, FP32, DEVICE))
    reason = why_not(backend, call_of(q, k, v, pattern))
    if reason:
        pytest.skip(reason)
    out, lse = sparse_attention(q, k, v, pattern, backend=backend, return_lse=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference' for create_graph=True"):
        torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), create_graph=True)


def test_a_second_derivative_of_chunks_is_refused():
    q, k, v = (t.requires_grad_() for t in tensors((4, 4, 16), 40, 40, FP32))
    out, _ = chunked_attention(q, k, v, Chunking(16, 1, 0, 16, 0), buckets=torch.zeros(2, 4, 1, 40, dtype=torch.long))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)


ONCE = {
    "the divergence from a teacher": lambda t: distillation._Divergence.apply(t, t.detach(), torch.ones(4) > 0, 1.0),
    "an exchange between processes": lambda t: exchange._Swap.apply(
        t, SimpleNamespace(swap_values=lambda t, *_: t), [4], [4]
    ),
    "attention of marked tokens": lambda t: rows.write_rows(t[None].exp(), t[:1], torch.tensor([2])),
    "a stack of reversible layers": lambda t: of_reversible_layers(t),
}


def of_reversible_layers(t):
    ours = sparse_hf.sparsify(reformers.stock_model("ReformerModel")).train()
    states = torch.nn.functional.pad(t, (0, ours.config.hidden_size - t.shape[1]))[None]
    return ours(inputs_embeds=states)[0]


@pytest.mark.parametrize("what", ONCE)
def test_what_is_no_attention_refuses_it_too(what):
    t = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{what} has no second derivative; call autograd without create_graph=True"):
        torch.autograd.grad(ONCE[what](t).sum(), t, create_graph=True)


@pytest.mark.parametrize("pattern", ["window(2, 2) | first(1)", "window(2, 0) | lsh(4, 1, 4)"])
def test_the_reference_has_a_second_derivative(pattern):
    q, k, v = (t[:1, :, :, :3].contiguous().requires_grad_() for t in tensors((2, 1, 16), 6, 6, torch.float64))
    real = torch.ones(1, 6, dtype=torch.bool)
    real[0, :2] = False

    def function(q, k, v):
        return sparse_attention(q, k, v, pattern, key_padding_mask=real, backend="reference")

    if "lsh" in pattern:
        # buckets jump, so that differences of outputs are no derivatives: only that there is one
        (grad,) = torch.autograd.grad(function(q, k, v).square().sum(), q, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), (q, k, v))[0].isfinite().all()
        return
    assert torch.autograd.gradcheck(function, (q, k, v)) and torch.autograd.gradgradcheck(function, (q, k, v))


@pytest.mark.parametrize("backend", [*BACKENDS.values(), DENSE, DECODE], ids=lambda backend: backend.name)
@pytest.mark.parametrize("missing", ["nothing", "grad_out", "grad_lse"])
def test_gradients_of_a_share_add_up(backend, missing, request):
    """A backend that is handed out and lse of a whole gives what its pairs add to the gradients of that."""
    if backend.name == "triton":
        request.getfixturevalue("interpreted")
    wants_lse = backend not in (DENSE, DECODE)
    if not wants_lse:
        pytest.skip("it is never a part of a whole: it gives no lse")
    q, k, v = tensors((4, 2, 16), 60, 60, FP32, DEVICE)
    parts = [call_of(q, k, v, text) for text in ("window(9, 0)", "window(None, 0) & outside(window(9, 0))")]
    for part in parts:
        reason = backend.why_not(part)
        if reason:
            pytest.skip(reason)
    out, lse = merge([backend.forward(part) for part in parts])
    exact = [t.double().cpu().requires_grad_() for t in (q, k, v)]
    right, right_lse = oracle.attention(*exact, oracle.dense_mask("window(None, 0)", 60, 60))
    torch.testing.assert_close(out.double().cpu(), right, atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(1)
    of_out = None if missing == "grad_out" else torch.randn(out.shape, generator=generator)
    of_lse = None if missing == "grad_lse" else torch.randn(lse.shape, generator=generator)
    asked = [(t, of) for t, of in ((right, of_out), (right_lse, of_lse)) if of is not None]
    wanted = torch.autograd.grad([t for t, _ in asked], exact, [of.double() for _, of in asked], allow_unused=True)
    given = Given(out, lse, *(None if of is None else of.to(out) for of in (of_out, of_lse)))
    found = [backend.backward(part, given)[:3] for part in parts]
    for one, other, right in zip(*found, wanted, strict=True):
        right = torch.zeros_like(one, dtype=torch.float64).cpu() if right is None else right
        torch.testing.assert_close((one + other).double().cpu(), right, atol=5e-5, rtol=1e-4)


def test_nothing_is_differentiated_where_nobody_asks():
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 16), 200, 200, FP32))
    with torch.no_grad():
        assert sparse_attention(q, k, v, "window(9, 0)").grad_fn is None
    call = call_of(q.detach(), k.detach(), v.detach(), "window(9, 0)")
    out, lse = attend(call, BACKENDS["blockwise"])
    assert out.grad_fn is None and lse.grad_fn is None
    only_v = call_of(q.detach(), k.detach(), v, "window(9, 0)")
    (grad,) = torch.autograd.grad(attend(only_v, BACKENDS["blockwise"])[0].sum(), v)
    assert grad.shape == v.shape
