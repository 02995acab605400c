"""Attention as an operator of torch: its own checks, compiled gradients, and tensors without content."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sparse_hf import sparse_attention
from sparse_hf.attention import BACKENDS
from sparse_hf.attention.autograd import AutogradBackend
from sparse_hf.attention.hashed.reformer import chunked_attention
from sparse_hf.plan.hash_order import Chunking
from tests.attention.exactness import leaves

SIZES = (1, 4, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8)


def test_operator_agrees_with_torchs_own_checks():
    q, k, v = leaves(*SIZES)
    real = torch.ones(1, 40, dtype=torch.bool)
    arguments = (q, k, v, real, None, None, None, None, "window(5, 0)", 0, 0.5, None, 0.0, "auto")
    torch.library.opcheck(torch.ops.sparse_hf.attention.default, arguments)
    torch.library.opcheck(torch.ops.sparse_hf.attention_recorded.default, (*arguments[:3], None, *arguments[4:]))


def test_the_operator_with_a_bias_agrees_with_torchs_own_checks():
    q, k, v, bias = leaves(*SIZES, (4, 79))
    seed = torch.tensor(3)
    arguments = (q, k, v, None, None, None, seed, bias, "window(5, 0)", 0, 0.5, 2.0, 0.2, "auto")
    torch.library.opcheck(torch.ops.sparse_hf.attention.default, arguments)


def test_the_operator_of_chunks_agrees_with_torchs_own_checks():
    q, k, v = leaves(*[(1, 2, 48, 8)] * 3)
    buckets = torch.randint(4, (1, 2, 2, 48))
    arguments = (q, k, v, buckets, None, None, 16, 1, 0, 16, 0, True, False, 0.3, 0.0, False)
    torch.library.opcheck(torch.ops.sparse_hf.chunked_attention.default, arguments)
    torch.library.opcheck(torch.ops.sparse_hf.chunked_attention_recorded.default, arguments)


def test_compiled_gradients_of_a_backend_that_leans_on_autograd(monkeypatch):
    """As FlexAttention, which pads, gathers and merges around its own kernel."""

    class Leaning(AutogradBackend):
        name = "leaning"

        def why_not(self, call):
            return None

        def forward(self, call):
            q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, 3)) for t in (call.q, call.k, call.v))
            scores = q @ k.repeat_interleave(2, 1).mT * call.scoring.scale
            mask = torch.nn.functional.pad(call.blocks.to_dense()[:, 0], (0, 3, 0, 3))
            mask[:, -3:] = True
            weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
            lse = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1)
            return (weights @ v.repeat_interleave(2, 1))[:, :, :-3], lse[..., :-3]

    monkeypatch.setitem(BACKENDS, "leaning", Leaning())
    tensors = leaves(*SIZES)

    def gradients(backend, compiled):
        def loss(q, k, v):
            out, lse = sparse_attention(q, k, v, "window(5, 0)", backend=backend, return_lse=True)
            return out.square().sum() + lse.sum()

        loss = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        return torch.autograd.grad(loss(*tensors), tensors)

    for one, other in zip(gradients("leaning", True), gradients("blockwise", False), strict=True):
        torch.testing.assert_close(one, other)


# with and without batch data, recorded and not; `lsh` and dropout are never recorded
GIVEN = {
    "nothing": {},
    "padding": {"key_padding_mask": torch.arange(40)[None] >= 7},
    "documents": {"segment_ids": torch.arange(40)[None] // 15},
    "marks": {"marks": torch.arange(40)[None] % 9 == 0},
    "dropout": {"dropout": 0.3},
    "cap and bias": {"softcap": 5.0, "relative_bias": torch.zeros(4, 79)},
}


@pytest.mark.parametrize(
    "pattern", ["window(5, 0) | marked()", "window(3, 3) | lsh(4, 2, 8)", "window(3, 3) | topk(8)", "stride(4)"]
)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_tensors_without_content_give_shapes(mode, given, pattern):
    how = GIVEN[given]
    if ("lsh" in pattern or "topk" in pattern) and given == "cap and bias":
        pytest.skip("lsh(...) has neither, topk(...) no bias")
    wanted = attended(leaves(*SIZES, dtype=torch.bfloat16), pattern, how)
    if mode == "fake":
        with FakeTensorMode() as fake:
            how = {name: fake.from_tensor(t) if isinstance(t, torch.Tensor) else t for name, t in how.items()}
            found = attended(leaves(*SIZES, dtype=torch.bfloat16), pattern, how)
    else:
        how = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in how.items()}
        found = attended(
            [t.detach().to("meta").requires_grad_() for t in leaves(*SIZES, dtype=torch.bfloat16)], pattern, how
        )
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
    # nothing of it is met again in a call with content
    for one, other in zip(attended(leaves(*SIZES, dtype=torch.bfloat16), pattern, GIVEN[given]), wanted, strict=True):
        assert type(one) is torch.Tensor and one.shape == other.shape


def attended(qkv, pattern: str, how: dict) -> list[torch.Tensor]:
    """Out, lse and gradients."""
    out, lse = sparse_attention(*qkv, pattern, **how, return_lse=True)
    return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), qkv)]


def test_chunks_without_content_give_shapes():
    chunking = Chunking(16, 1, 0, 16, 0)
    q, k, v = (t.detach().to("meta").requires_grad_() for t in leaves(*[(1, 2, 48, 8)] * 3))
    out, lse = chunked_attention(q, k, v, chunking)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert all(
        grad.shape == t.shape for grad, t in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True)
    )
