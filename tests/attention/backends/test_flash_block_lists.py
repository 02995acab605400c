"""Block lists of `fa` without a GPU: what the kernels are given, and the merge and its gradients in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan
from sparse_hf.attention.backends.flash import backend as fa
from sparse_hf.attention.backends.flash import block_lists as fa_blocks
from sparse_hf.attention.backends.flash import window_kernels as flash
from sparse_hf.attention.scoring import Scoring
from sparse_hf.plan import split
from sparse_hf.plan import tile_lists as lists
from tests import oracle
from tests.table import LENGTHS, PATTERNS, SCENARIOS, causal_form, scenario

SIZE = fa_blocks.SIZE


class Plain:
    """flash-attn-4's block-sparse kernels in plain PyTorch, with the interface of `fa_blocks_kernels`."""

    @staticmethod
    def _allowed(q, k, walk, by_query: bool):
        """`[B, H, Q, K]` bool from the tables alone."""
        batch, heads, lengths = q.shape[0], q.shape[2], (q.shape[1], k.shape[1])
        counts, blocks, full_counts, full_blocks = walk.lists
        lines, others = (-(-n // SIZE) for n in (lengths if by_query else lengths[::-1]))
        for count, listed in ((counts, blocks), (full_counts, full_blocks)):
            assert count.dtype == listed.dtype == torch.int32 and count.shape == listed.shape[:3]
            assert count.shape[0] == batch and count.shape[1] in (1, heads) and count.shape[2] == lines
            assert listed.shape[3] <= others and count.max() <= listed.shape[3]
        assert all(t.dtype == torch.int32 and t.ndim == 1 for t in walk.masks)
        *numbers, words = (t if i == 4 else t.tolist() for i, t in enumerate(walk.masks))
        allowed = torch.zeros(batch, heads, *(-(-n // SIZE) * SIZE for n in lengths), dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                for line in range(lines):
                    at = b, h % counts.shape[1], line
                    masked = blocks[at][: counts[at]].tolist()
                    full = full_blocks[at][: full_counts[at]].tolist()
                    # kernels look for keys beyond the last in the last block of each list only
                    assert masked == sorted(set(masked)) and full == sorted(set(full)) and not set(masked) & set(full)
                    for other in (*masked, *full):
                        bits = Plain._bits(words, numbers, b, h, line, other) if other in masked else True
                        i, j = (line, other) if by_query else (other, line)
                        allowed[b, h, i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE] = bits
        # kernels see no further than the last query and key
        return allowed[:, :, : lengths[0], : lengths[1]]

    @staticmethod
    def _bits(words, numbers, b, h, line, other):
        (heads, lines), groups, places, starts = numbers
        place = (groups[b * heads + h] * lines + line) * 2
        factor, begin = (number & 0xFFFFFFFF for number in places[place : place + 2])
        slot = (begin >> 5) + ((other * factor & 0xFFFFFFFF) >> (begin & 31))
        inside = torch.arange(SIZE)
        word = words[starts[slot] + inside[:, None] * 4 + inside // 32]
        return (word >> inside % 32 & 1).bool()

    @staticmethod
    def _scores(q, k, allowed, scale):
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~allowed, -torch.inf)

    @staticmethod
    def forward(q, k, v, walk, scale):
        scores = Plain._scores(q, k, Plain._allowed(q, k, walk, True), scale)
        v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, grad_lse, walk, scale):
        assert lse.is_contiguous() and (grad_lse is None or grad_lse.is_contiguous())
        repeats = q.shape[2] // k.shape[2]
        weights = (Plain._scores(q, k, Plain._allowed(q, k, walk, False), scale) - lse[..., None]).exp()
        delta = (grad_out * out).sum(-1).transpose(1, 2) - (0 if grad_lse is None else grad_lse)
        gained = torch.einsum("bqhd,bkhd->bhqk", grad_out, v.repeat_interleave(repeats, 2))
        change = weights * (gained - delta[..., None]) * scale
        grad_q = torch.einsum("bhqk,bkhd->bqhd", change, k.repeat_interleave(repeats, 2))
        of_keys = ((change, q), (weights, grad_out))
        return grad_q, *(torch.einsum("bhqk,bqhd->bkhd", w, t).unflatten(2, (-1, repeats)).sum(3) for w, t in of_keys)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(fa_blocks, "kernels", lambda: Plain)
    monkeypatch.setattr(flash, "kernels", lambda q: Plain)


def compare(pattern: str, length: int, case: str, heads: int = 4, groups: int = 2, **rest) -> bool:
    """False where the plan is a window, which goes another way."""
    data = scenario(case, length)
    q_len = data.pop("q_len")
    given = {"key_padding_mask": data["real"], "segment_ids": data["documents"], "marks": data["marks"]}
    plan = build_plan(pattern, q_len, length, **given, **rest)
    if not isinstance(split(plan, 2), str):
        return False
    sizes = (heads, q_len), (groups, length), (groups, length)
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in sizes)
    mask = oracle.dense_mask(pattern, q_len, length, **data)
    exact = oracle.gradients(lambda *t: oracle.attention(*t, mask), q, k, v)
    ours = oracle.gradients(lambda *t: fa.attend(*t, plan, Scoring(8**-0.5), 0.0, None), q, k, v)
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted)
    return True


@pytest.mark.parametrize(
    ("pattern", "case", "length"),
    [
        (causal_form(pattern) if c % 2 else pattern, case, LENGTHS[(p // 2 + c) % 4])
        for p, pattern in enumerate(PATTERNS)
        for c, case in enumerate(SCENARIOS)
        if (p + c) % 2
    ],
)
def test_lists_and_their_gradients_are_exact(pattern, case, length, plain):
    compare(pattern, length, case)


GLOBAL = "(window(20, 20) | first(3) | last(2) | chunk(50)) & window(None, None)"


@pytest.mark.parametrize("case", ["last_queries", "packed_and_padded"])
@pytest.mark.parametrize(
    "pattern", [GLOBAL, causal_form(GLOBAL), "bigbird(block_size=32)", "per_head(chunk(9), first(1) | chunk(9))"]
)
def test_long_lines_are_merged_exactly(pattern, case, plain, monkeypatch):
    # so that a text of some blocks has long lines
    monkeypatch.setattr(lists, "PROGRAM_TILES", 2)
    monkeypatch.setattr(lists, "HOST_BOUND_TILES", 0)
    monkeypatch.setattr(lists, "PROGRAM_TILES_OVER_MEAN", 0.5)
    monkeypatch.setattr(lists, "SEGMENT_TILES_OVER_ROOT", 0)
    assert compare(pattern, 700, case, heads=2, groups=1)


def test_a_long_text_with_global_tokens_has_narrow_tables():
    plan = build_plan("window(256, 256) | first(100) | chunk(384)", 1 << 16)
    for by_query in (True, False):
        walk = fa_blocks._walk(plan, by_query, 1, 16)
        assert walk.lists[1].shape[-1] < 64 and walk.lists[3].shape[-1] < 64
        # 512 lines, and the segments of one
        assert 512 < walk.lists[0].shape[-1] < 540
        # a table of all pairs of blocks would have 512 * 512
        assert len(walk.masks[3]) < 512 * 64


def test_every_block_of_a_line_has_a_slot_of_its_own():
    line = torch.arange(50).repeat_interleave(20)
    other = torch.stack([torch.randperm(5000)[:20] for _ in range(50)]).flatten()
    lines, starts = fa_blocks._hashed(line, other, torch.arange(1000), 50, 5000)
    factor, begin = lines.view(50, 2)[line].long().bitwise_and(0xFFFFFFFF).unbind(1)
    slot = (begin >> 5) + ((other * factor & 0xFFFFFFFF) >> (begin & 31))
    assert torch.equal(starts[slot], torch.arange(1000))
    assert len(starts) < 50 * 400


def test_one_text_after_another_asks_for_the_same_kinds_of_tensors(plain, monkeypatch):
    # kernels are compiled for dimensions, dtypes and sizes of 1; anything else must be in tensors
    seen = set()
    original = Plain.forward

    def forward(q, k, v, walk, scale):
        seen.add(tuple((t.dtype, t.is_contiguous(), t.ndim, t.shape[1:2] == (1,)) for t in (*walk.lists, *walk.masks)))
        return original(q, k, v, walk, scale)

    monkeypatch.setattr(Plain, "forward", staticmethod(forward))
    for n, pattern in ((257, "chunk(50)"), (1000, "bigbird(block_size=32)"), (700, "stride(7)")):
        q = torch.randn(2, 2, n, 8)
        fa.attend(q, q, q, build_plan(pattern, n), Scoring(8**-0.5), 0.0, None)
    assert len(seen) == 1


def test_a_mask_function_is_evaluated(plain):
    plan = build_plan("window(None, 0)", 300, mask_function=lambda b, h, q, k: (q + k) % 3 == 0)
    q, k, v = (torch.randn(1, 2, 300, 8, dtype=torch.float64) for _ in range(3))
    x = torch.arange(300)
    mask = ((x[:, None] + x) % 3 == 0) & (x <= x[:, None])
    exact = oracle.gradients(lambda *t: oracle.attention(*t, mask[None, None]), q, k, v)
    ours = oracle.gradients(lambda *t: fa.attend(*t, plan, Scoring(8**-0.5), 0.0, None), q, k, v)
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted)


def test_lists_are_fastest_where_they_were_measured_so():
    def fastest(pattern: str, length: int, head_dim: int = 128) -> bool:
        return fa_blocks.are_fastest(torch.empty(1, 16, length, head_dim, device="meta"), build_plan(pattern, length))

    assert fastest("bigbird(block_size=128)", 65_536)
    assert not fastest("bigbird(block_size=128)", 16_384) and not fastest("bigbird(block_size=128)", 131_072, 64)
    # blocks of it have masks
    assert not fastest("chunk(50)", 65_536)
