"""`attend_chosen` against dense attention in float64 over the very same choice."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.attention.chosen import attend_chosen, backend, pieces
from sparse_hf.attention.chosen.api import chosen_call
from sparse_hf.attention.chosen.choice import ChosenKeys
from sparse_hf.attention.dropout import NO_DROPOUT
from sparse_hf.attention.scoring import Scoring
from sparse_hf.testing import AllocationInterceptor
from tests.attention.exactness import DEVICE, check
from tests.oracle import gradients

# (query heads, key heads, heads of the choice, head dim, head dim of values)
SHAPES = [(2, 2, 2, 16, 16), (4, 2, 1, 24, 16), (6, 2, 2, 16, 40), (4, 2, 4, 32, 32), (5, 1, 1, 64, 16)]
# queries, keys, chosen keys
LENGTHS = [(1, 1, 1), (1, 63, 7), (63, 63, 20), (33, 100, 100), (100, 100, 5)]


def drawn(shape, lengths, dtype=torch.float64, batch=2):
    """Queries, keys, values, and a choice of different keys, of which some are none and one row has none at all."""
    heads, groups, of_choice, dim, wide = shape
    queries, keys, chosen = lengths
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = (heads, queries, dim), (groups, keys, dim), (groups, keys, wide)
    tensors = [torch.randn(batch, *size, generator=generator, dtype=torch.float64) for size in sizes]
    order = torch.rand(batch, of_choice, queries, keys, generator=generator).argsort(-1)[..., :chosen]
    index = order.where(torch.rand(order.shape, generator=generator) < 0.8, -1)
    index[0, 0, 0] = -1
    # all dtypes see the values that the coarsest can hold
    return [t.to(torch.bfloat16).to(dtype) for t in tensors], index


def dense(index, heads, keys, *, scale=None, soft_cap=None, sinks=None):
    """Attention under the mask of a choice, one softmax with the sink as one more key."""
    there = index >= 0
    mask = torch.zeros(*index.shape[:3], keys + 1, dtype=torch.bool)
    mask.scatter_(-1, index.where(there, keys), True)
    mask = mask[..., :keys].repeat_interleave(heads // index.shape[1], 1)

    def attend(q, k, v):
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()
        sees = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask & sees, -torch.inf)
        lse = scores.logsumexp(-1)
        full = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse)[:, None].expand_as(lse))
        weights = (scores - full[..., None]).exp() * sees
        return weights @ v, lse.masked_fill(~sees[..., 0], -torch.inf)

    return attend


def compare(shape, lengths, dtype, device="cpu", batch=2, **how):
    tensors, index = drawn(shape, lengths, batch=batch)
    right = gradients(dense(index, shape[0], lengths[1], **how), *tensors)
    rounded = [t.to(dtype) for t in tensors]
    plain = gradients(dense(index, shape[0], lengths[1], **how), *rounded)
    ours = gradients(lambda *t: attend_chosen(*t, index.to(device), **how), *(t.to(device) for t in rounded))
    check(right, plain, ours, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_attention(shape, lengths, dtype):
    compare(shape, lengths, dtype)


@pytest.mark.parametrize("how", [{"scale": 0.3}, {"soft_cap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
def test_scores(how):
    compare((4, 2, 2, 16, 24), (40, 50, 9), torch.float64, **how)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("shape", "how"), [*((shape, {}) for shape in SHAPES), (SHAPES[1], {"soft_cap": 2.0})])
def test_kernels_equal_dense_attention(shape, how, monkeypatch):
    monkeypatch.setattr(backend.gathers, "LEAST_CHOOSERS", 4)
    monkeypatch.setattr(backend.gathers, "MAX_PART_BYTES", 8000)
    compare(shape, (8, 10, 4), torch.float32, DEVICE, batch=2 if shape == SHAPES[1] else 1, **how)


@pytest.mark.usefixtures("interpreted")
def test_kernels_in_16_bits():
    compare(SHAPES[1], (3, 40, 35), torch.float16, DEVICE, batch=1)


ON_A_GPU = [
    ((16, 16, 1, 128, 128), torch.bfloat16), ((8, 2, 2, 128, 128), torch.bfloat16), ((12, 4, 12, 80, 40), torch.bfloat16),
    ((32, 1, 1, 64, 64), torch.float16), ((8, 2, 1, 32, 32), torch.float32),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), ON_A_GPU, ids=str)
def test_kernels_on_a_gpu(shape, dtype):
    compare(shape, (150, 300, 70), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "how"), [((16, 16, 1, 192, 128), {}), ((128, 1, 1, 256, 256), {"soft_cap": 2.0})], ids=str
)
def test_wide_heads_on_a_gpu(shape, how):
    compare(shape, (60, 300, 70), torch.bfloat16, "cuda", **how)


def test_gradient_of_sinks():
    tensors, index = drawn((4, 2, 1, 16, 16), (20, 30, 8))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    found, right = (
        torch.autograd.grad(attend(*tensors)[0].square().sum(), sinks)[0]
        for attend in (lambda *t: attend_chosen(*t, index, sinks=sinks), dense(index, 4, 30, sinks=sinks))
    )
    torch.testing.assert_close(found, right)


def test_pieces_change_nothing(monkeypatch):
    tensors, index = drawn((4, 2, 2, 16, 16), (50, 50, 9))
    whole = gradients(lambda *t: attend_chosen(*t, index), *tensors)
    monkeypatch.setattr(pieces, "MAX_GATHERED", 900)
    for one, other in zip(whole, gradients(lambda *t: attend_chosen(*t, index), *tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_a_choice_without_keys():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 8)
    for index in (torch.full((1, 1, 3, 4), -1), torch.zeros(1, 1, 3, 0, dtype=torch.long)):
        out, lse = attend_chosen(q, k, v, index)
        assert not out.any() and (lse == -torch.inf).all()


def test_a_batch_may_share_a_choice():
    tensors, index = drawn((4, 2, 2, 16, 16), (12, 20, 5))
    shared = attend_chosen(*tensors, index[1:])
    for one, other in zip(shared, attend_chosen(*tensors, index[1:].expand(2, -1, -1, -1)), strict=True):
        torch.testing.assert_close(one, other)


def test_dropped_weights_have_their_mean():
    tensors, index = drawn((2, 1, 1, 16, 16), (3, 20, 12))
    index = index.clamp(min=0)
    torch.manual_seed(1)
    many = torch.stack([attend_chosen(*tensors, index, dropout=0.3)[0] for _ in range(400)])
    torch.testing.assert_close(many.mean(0), attend_chosen(*tensors, index)[0], atol=0.15, rtol=0)
    torch.manual_seed(1)
    leaves = [t.requires_grad_() for t in tensors]
    out = attend_chosen(*leaves, index, dropout=0.3)[0]
    # a dropped value has no gradient: what the gradient says of the weights gives the output again
    grad = torch.autograd.grad((out * torch.ones_like(out)).sum(), leaves[2])[0]
    torch.testing.assert_close((grad * leaves[2]).sum(), out.sum())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    torch._dynamo.reset()
    tensors, index = drawn((4, 2, 1, 16, 24), (30, 30, 8), torch.float32)
    sinks = torch.randn(4)

    def attend(*t):
        return attend_chosen(*t, index, sinks=sinks)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for one, other in zip(gradients(compiled, *tensors), gradients(attend, *tensors), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": torch.zeros(1, 3, 5, 2, dtype=torch.long)}, "must have 1, 2 or 4 heads"),
        ({"chosen": torch.zeros(1, 1, 4, 2, dtype=torch.long)}, "the length of query"),
        ({"chosen": torch.zeros(1, 1, 5, 2)}, "int32 or int64"),
        ({"chosen": torch.full((1, 1, 5, 2), 9)}, "names key 9; there are 6 keys"),
        ({"key": torch.zeros(1, 3, 6, 8)}, "must agree"),
        ({"value": torch.zeros(1, 2, 6, 8).double()}, "must agree and be floating point"),
        ({"sinks": torch.zeros(2)}, "one for each query head"),
        ({"soft_cap": 0.0}, "must be positive"),
        ({"dropout": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    given = {
        "query": torch.zeros(1, 4, 5, 8), "key": torch.zeros(1, 2, 6, 8), "value": torch.zeros(1, 2, 6, 8),
        "chosen": torch.zeros(1, 1, 5, 2, dtype=torch.long), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        attend_chosen(**given)


def test_no_tensor_has_two_lengths():
    length = 16_384
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    index = torch.randint(length, (1, 1, length, 16))
    with AllocationInterceptor(length) as seen:
        attend_chosen(q, k, v, index)[0].sum().backward()
    assert not seen.quadratic


def test_blocks_go_together_where_a_gpu_has_the_memory(monkeypatch):
    def size_of(size, dim, heads=4):
        q, k = (torch.zeros(1, h, 300, dim, dtype=torch.float16) for h in (heads, 2))
        index = torch.zeros(1, 2, 300, 2 * size, dtype=torch.int32)
        call = chosen_call(q, k, k, index, Scoring(1.0), NO_DROPOUT)
        call = call.part(q, k, k, ChosenKeys(index, size), NO_DROPOUT)
        return backend.gathers.block_size(call), backend.by_blocks.is_better(call)

    # heads that fill a tile of one query need no others, and a size that no tile has has no block
    assert [size_of(64, 128), size_of(128, 128), size_of(64, 128, 32), size_of(24, 64), size_of(64, 160)] == [
        (64, True), (128, True), (64, False), (1, False), (1, False),
    ]  # fmt: skip
    for bytes_, wanted in ((200 << 10, (64, 1)), (64 << 10, (1, 1))):
        monkeypatch.setattr(backend.gathers, "shared_bytes", lambda device, bytes_=bytes_: bytes_)
        assert (size_of(64, 128)[0], size_of(128, 128)[0]) == wanted
