"""New tokens over the slots of a static or streaming cache, whose filled number is on the device, against attention in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf.attention.scoring import Scoring
from sparse_hf.attention.slots import new_tokens
from sparse_hf.attention.slots.new_tokens import Filled, slots_attention
from sparse_hf.attention.slots.reach import read_reach
from sparse_hf.attention.slots.ring import NO_RING, Ring, positions_in, slots_of
from sparse_hf.pattern import Pattern
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.exactness import DEVICE, ROUNDINGS

SLOTS = 150
WINDOWS = ("window(20, 0)", "window(20, 0) | first(3)", "window(None, 0)", "window(0, 0)", "first(9) & window(None, 0)")
OTHERS = (
    "stride(4) & window(None, 0)", "window(5, 0) | marked() & window(None, 0)", "chunk(16) & window(None, 0)",
    "per_head(window(3, 0), window(20, 0) | first(2), window(None, 0), stride(3) & window(None, 0))",
    "window(9, 0) | first(40) & window(None, 0)", "fixed(16, 2) & window(None, 0)",
)  # fmt: skip
# tokens that came before, and new ones: the first ever, in the middle, up to the last slot
COUNTS = [(0, 1), (0, 5), (30, 1), (77, 5), (SLOTS - 1, 1), (SLOTS - 17, 17)]


def in_ring(t, begins, filled: int, ring: Ring):
    """What a ring holds of the tokens `[B, G, K, D]`, written one after the other; what was there before is of another text."""
    held = torch.full((*t.shape[:2], ring.slots, t.shape[3]), 1e3, dtype=t.dtype)
    for row, begin in enumerate(begins.tolist()):
        for position in range(filled - begin):
            held[row, :, int(slots_of(ring, torch.tensor(position)))] = t[row, :, begin + position]
    return held


def compare(
    pattern: str, seen: int, new: int, shape, dtype, padded: bool, softcap=None, device="cpu", ring: Ring = NO_RING
) -> None:  # fmt: skip
    heads, groups, dim = shape
    generator = torch.Generator().manual_seed(seen + new)
    sizes = ((heads, new), (groups, SLOTS), (groups, SLOTS))
    q, k, v = (torch.randn(2, h, n, dim, generator=generator).to(torch.bfloat16) for h, n in sizes)
    # what lies behind the new tokens is of another text
    k[:, :, seen + new :], v[:, :, seen + new :] = 1e3, 1e3
    real = torch.ones(2, SLOTS, dtype=torch.bool)
    real[:, seen + new :] = False
    if padded:
        real[1, : min(seen, 11)] = False
    marks = torch.rand(2, SLOTS, generator=generator) < 0.1
    filled = seen + new
    mask = oracle.dense_mask(pattern, new, filled, real[:, :filled], None, marks[:, :filled])
    exact, lse = capped(q.double(), k[:, :, :filled].double(), v[:, :, :filled].double(), mask, softcap)
    count = torch.tensor(seen, device=device)
    held = Filled(count, real.to(device) if padded else None, marks.to(device))
    if ring:
        begins = torch.tensor([0, min(seen, 11) if padded else 0])
        k, v = (in_ring(t, begins, filled, ring) for t in (k, v))
        held = Filled(count, begins=begins.to(device) if padded else None, ring=ring)
    tensors, scoring = [t.to(device, dtype) for t in (q, k, v)], Scoring(dim**-0.5, softcap)
    limit = {"atol": 10 * ROUNDINGS[dtype], "rtol": 10 * ROUNDINGS[dtype]}
    for wants_lse in (False, True):
        got, sums = slots_attention(*tensors, held, pattern, scoring, wants_lse)
        assert got.dtype == dtype and int(count) == seen
        torch.testing.assert_close(got.cpu().double(), exact, **limit)
    torch.testing.assert_close(sums.cpu().double(), lse, **limit)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("pattern", ["window(None, 0)", "full() & window(None, 0)"])
def test_padding_inside_a_row_under_the_whole_past(pattern, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(new_tokens, "MAX_ROWS", 0)
    q, k, v = (torch.randn(2, h, n, 16, device=DEVICE) for h, n in ((4, 3), (2, SLOTS), (2, SLOTS)))
    real = torch.rand(2, SLOTS, device=DEVICE) < 0.7
    real[:, 60:63] = True
    count = torch.tensor(60, device=DEVICE)
    got, _ = slots_attention(q, k, v, Filled(count, real), pattern, Scoring(0.25))
    seen = torch.arange(SLOTS) <= torch.arange(60, 63)[:, None]
    right, _ = oracle.attention(*(t.cpu().double() for t in (q, k, v)), seen & real.cpu()[:, None, None])
    torch.testing.assert_close(got.cpu().double(), right, atol=1e-5, rtol=1e-5)


def capped(q, k, v, mask, softcap, bias=None):
    if softcap is None and bias is None:
        return oracle.attention(q, k, v, mask)
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = (scores if bias is None else scores + bias).masked_fill(~mask, -torch.inf)
    return torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize(("seen", "new"), COUNTS)
@pytest.mark.parametrize("pattern", WINDOWS + OTHERS)
def test_exact(pattern, seen, new):
    for i, padded in enumerate((False, True)):
        compare(pattern, seen, new, ((4, 2, 16), (4, 4, 8))[i], torch.float32, padded)


# as wide as they must be, and wider; one that never comes round, in which all is kept
RINGED = [
    ("window(20, 0)", Ring(0, 37)), ("window(20, 0) | first(3)", Ring(3, 40)), ("window(0, 0)", Ring(0, 17)),
    ("window(9, 0) | (first(4) & window(40, 0))", Ring(4, 57)), ("chunk(16) & window(None, 0)", Ring(0, 32)),
    ("per_head(window(3, 0), window(20, 0) | first(2), first(4), chunk(8) & window(None, 0))", Ring(4, 40)),
    ("stride(3) & window(24, 0) | first(1) & window(None, 0)", Ring(1, 41)), ("window(None, 0)", Ring(0, SLOTS)),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "new"), COUNTS)
@pytest.mark.parametrize(("pattern", "ring"), RINGED)
def test_exact_in_a_ring(pattern, ring, seen, new):
    for i, padded in enumerate((False, True)):
        compare(pattern, seen, new, ((4, 2, 16), (4, 4, 8))[i], torch.float32, padded, ring=ring)


@pytest.mark.parametrize("ring", [Ring(3, 7), Ring(0, 5), Ring(4, 1)])
def test_a_ring_holds_the_last_of_each_slot(ring):
    for count in range(40):
        held = [-1] * ring.slots
        for position in range(count):
            held[int(slots_of(ring, torch.tensor(position)))] = position
        assert positions_in(ring, torch.tensor([count]))[0].tolist() == held


@pytest.mark.parametrize("pattern", ["window(20, 0) | first(3)", "stride(4) & window(None, 0)"])
def test_soft_cap(pattern):
    compare(pattern, 77, 5, (4, 2, 16), torch.float32, True, softcap=2.0)


# the interpreter takes a second for each
KERNEL = [
    ("window(20, 0) | first(3)", 77, 5, True, NO_RING), ("window(None, 0)", 30, 1, False, NO_RING),
    ("window(20, 0)", 149, 1, True, NO_RING), ("window(20, 0) | first(3)", 77, 5, True, Ring(3, 26)),
    ("window(20, 0)", 30, 1, False, Ring(0, 24)), ("window(None, 0)", 77, 5, True, Ring(0, SLOTS)),
]  # fmt: skip


@pytest.mark.cross
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("pattern", "seen", "new", "padded", "ring"), KERNEL)
def test_the_kernels_are_exact(pattern, seen, new, padded, ring, softcap, monkeypatch):
    if DEVICE == "cpu":
        from sparse_hf.attention.slots import kernels

        # several splits, of which some hold nothing
        monkeypatch.setattr(kernels, "LEAST_KEYS", 16)
        monkeypatch.setattr(kernels, "BLOCK", {64: 16, 128: 16, 256: 16})
    compare(pattern, seen, new, (4, 2, 16), torch.float32, padded, softcap, DEVICE, ring)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 2, 128), (6, 2, 80), (4, 1, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("seen", "new"), COUNTS)
def test_the_kernels_are_exact_on_a_gpu(seen, new, dtype, shape):
    if dtype == torch.float32 and shape[2] > 128:
        pytest.skip("kernels in float32 take head dims up to 128")
    for pattern in (*WINDOWS, *OTHERS[:3]):
        compare(pattern, seen, new, shape, dtype, True, device="cuda")
        compare(pattern, seen, new, shape, dtype, False, device="cuda")
    for pattern, ring in RINGED:
        # per_head(...) names four heads
        if shape[0] == 4 or "per_head" not in pattern:
            compare(pattern, seen, new, shape, dtype, True, device="cuda", ring=ring)


@pytest.mark.parametrize("padded", [False, True])
def test_a_window_reads_no_more_than_it_holds(padded):
    """Nothing is as long as the cache but the mask of tokens that is given."""
    k, v = (torch.randn(1, 2, 9973, 8) for _ in range(2))
    real = torch.ones(1, 9973, dtype=torch.bool) if padded else None
    with AllocationInterceptor(9973) as found:
        slots_attention(
            torch.randn(1, 4, 1, 8), k, v, Filled(torch.tensor(5000), real), "window(20, 0) | first(3)", Scoring(1.0)
        )
    assert not found.quadratic


@pytest.mark.parametrize(
    ("pattern", "reach"),
    [
        ("window(20, 0)", (20, 0)),
        ("window(20, 0) | first(4) & window(None, 0)", (20, 4)),
        ("window(None, 0)", (100, 0)),
        ("window(20, 5)", None),
        ("window(20, 0) | marked()", None),
        ("stride(4)", None),
        ("per_head(window(1, 0), window(2, 0))", None),
    ],
)
def test_what_is_read_as_a_window(pattern, reach):
    assert read_reach(Pattern.parse(pattern), 100) == reach


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("seen", "new"), COUNTS)
@pytest.mark.parametrize("pattern", [WINDOWS[1], WINDOWS[2], OTHERS[0]])
def test_a_bias_by_distance(pattern, seen, new, softcap):
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, new), (2, SLOTS), (2, SLOTS)))
    bias, end = torch.randn(4, 2 * SLOTS - 1), seen + new
    real = torch.arange(SLOTS) >= torch.tensor([[0], [min(seen, 9)]])
    mask = oracle.dense_mask(pattern, new, end, real[:, :end])
    of_pairs = bias.double()[:, torch.arange(end) - torch.arange(seen, end)[:, None] + SLOTS - 1]
    exact, lse = capped(q.double(), k[:, :, :end].double(), v[:, :, :end].double(), mask, softcap, of_pairs)
    scoring = Scoring(8**-0.5, softcap, bias)
    got, sums = slots_attention(q, k, v, Filled(torch.tensor(seen), real), pattern, scoring, wants_lse=True)
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.double(), lse, atol=1e-5, rtol=1e-5)
    got, _ = slots_attention(q, k, v, Filled(torch.tensor(seen), real), pattern, scoring)
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_ring_has_no_bias():
    q, k, v = (torch.randn(1, 2, n, 8) for n in (1, 9, 9))
    filled, scoring = Filled(torch.tensor(3), ring=Ring(1, 8)), Scoring(1.0, bias=torch.zeros(2, 17))
    with pytest.raises(NotImplementedError, match="ring of slots.*no relative bias"):
        slots_attention(q, k, v, filled, "window(3, 0)", scoring)
