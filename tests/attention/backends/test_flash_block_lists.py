"""Block lists of `fa`: what the kernels are given, the merge and its gradients; on a GPU with flash-attn-4 exactness and repeats."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention import attend
from sparse_hf.attention.backends.flash import block_lists
from sparse_hf.attention.backends.flash import window_kernels as flash
from sparse_hf.attention.dispatch import BACKENDS
from sparse_hf.plan import split
from sparse_hf.plan import tile_lists as lists
from tests import oracle
from tests.attention.backends.test_flash import poison
from tests.attention.exactness import call_of, compare, tensors
from tests.table import LENGTHS, PATTERNS, SCENARIOS, causal_form, scenario

SIZE = block_lists.SIZE


class Plain:
    """flash-attn-4's block-sparse kernels in plain PyTorch, with the interface of `block_list_kernels`."""

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
    def backward(q, k, v, given, walk, scale):
        out, lse, grad_out, grad_lse = given.out, given.lse, given.grad_out, given.grad_lse
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
    monkeypatch.setattr(block_lists, "kernels", lambda: Plain)
    monkeypatch.setattr(flash, "kernels", lambda q: Plain)


def compare_plain(pattern: str, length: int, case: str, heads: int = 4, groups: int = 2, **rest) -> bool:
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
    ours = oracle.gradients(lambda *t: attend(call_of(*t, plan), BACKENDS["fa"]), q, k, v)
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted)
    return True


@pytest.mark.cross("case", "length")
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
    compare_plain(pattern, length, case)


GLOBAL = "(window(20, 20) | first(3) | last(2) | chunk(50)) & window(None, None)"


@pytest.mark.cross
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
    assert compare_plain(pattern, 700, case, heads=2, groups=1)


def test_a_long_text_with_global_tokens_has_narrow_tables():
    plan = build_plan("window(256, 256) | first(100) | chunk(384)", 1 << 16)
    for by_query in (True, False):
        walk = block_lists._walk(plan, by_query, 1, 16)
        assert walk.lists[1].shape[-1] < 64 and walk.lists[3].shape[-1] < 64
        # 512 lines, and the segments of one
        assert 512 < walk.lists[0].shape[-1] < 540
        # a table of all pairs of blocks would have 512 * 512
        assert len(walk.masks[3]) < 512 * 64


def test_every_block_of_a_line_has_a_slot_of_its_own():
    line = torch.arange(50).repeat_interleave(20)
    other = torch.stack([torch.randperm(5000)[:20] for _ in range(50)]).flatten()
    lines, starts = block_lists._hashed(line, other, torch.arange(1000), 50, 5000)
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
        attend(call_of(q, q, q, build_plan(pattern, n)), BACKENDS["fa"])
    assert len(seen) == 1


def test_a_mask_function_is_evaluated(plain):
    plan = build_plan("window(None, 0)", 300, mask_function=lambda b, h, q, k: (q + k) % 3 == 0)
    q, k, v = (torch.randn(1, 2, 300, 8, dtype=torch.float64) for _ in range(3))
    x = torch.arange(300)
    mask = ((x[:, None] + x) % 3 == 0) & (x <= x[:, None])
    exact = oracle.gradients(lambda *t: oracle.attention(*t, mask[None, None]), q, k, v)
    ours = oracle.gradients(lambda *t: attend(call_of(*t, plan), BACKENDS["fa"]), q, k, v)
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted)


def test_lists_are_fastest_where_they_were_measured_so():
    def fastest(pattern: str, length: int, head_dim: int = 128) -> bool:
        return block_lists.are_fastest(torch.empty(1, 16, length, head_dim, device="meta"), build_plan(pattern, length))

    assert fastest("bigbird(block_size=128)", 65_536)
    assert not fastest("bigbird(block_size=128)", 16_384) and not fastest("bigbird(block_size=128)", 131_072, 64)
    # blocks of it have masks
    assert not fastest("chunk(50)", 65_536)


# (query heads, key heads, head dim): a kernel is compiled for each, in both directions
GPU_SHAPES = [(4, 2, 64), (4, 4, 128)]
GPU_PATTERNS = [
    "bigbird(block_size=64)",
    "summary(16, 3) | window(0, 0)",
    "ring(50, 2)",
    "fixed(128, 8)",
    "window(60, 60) & stride(3)",
    "window(30, 5) | marked() | chunk(50)",
    "chunk(24, 2, 1)",
    "first(300) | last(200) | chunk(64)",
    "block_table(128, ((0, 1), (1,), (), (0, 2, 3), (4, 1), (5,), (6, 0), (7,), (3, 8), (9,)))",
    "per_head(chunk(9), window(60, 60) & stride(3), random_blocks(2, 64, 1), first(4) | chunk(50))",
]
GPU_CASES = ["plain", "last_queries", "left_padding", "right_padding", "packed", "packed_and_padded"]


@pytest.fixture
def flash_attn_4():
    reason = flash.FA4.refuses(torch.empty(1, 64, device="cuda"))
    if reason or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(reason or "lists of blocks are for compute capability 9")


def run(*args) -> None:
    poison()
    compare("fa", *args, device="cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("pattern", GPU_PATTERNS)
def test_kernels_are_exact(pattern, case):
    index = GPU_PATTERNS.index(pattern) + GPU_CASES.index(case)
    text = causal_form(pattern) if index // 2 % 2 else pattern
    run(text, [1000, 1153, 257, 1280][index % 4], case, GPU_SHAPES[index % 2], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
@pytest.mark.parametrize("pattern", GPU_PATTERNS[:3])
def test_kernels_are_exact_in_float16(pattern):
    run(pattern, 1153, "packed", (4, 2, 64), torch.float16)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
@pytest.mark.parametrize("length", [1, 63, 100, 128, 129])
def test_short_texts_are_exact(length):
    run("chunk(50)", length, "plain", (4, 2, 64), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 4, 32), (4, 1, 32), (6, 2, 96)])
def test_kernels_are_exact_at_other_head_dims(shape):
    run("window(60, 60) & stride(3)", 1000, "left_padding", shape, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
@pytest.mark.parametrize(
    "pattern", ["first(300) | last(200) | chunk(64)", "per_head(chunk(9), first(1), stride(7), chunk(50))"]
)
def test_long_lines_are_merged_exactly_by_kernels(pattern, monkeypatch):
    monkeypatch.setattr(lists, "PROGRAM_TILES", 2)
    monkeypatch.setattr(lists, "HOST_BOUND_TILES", 0)
    monkeypatch.setattr(lists, "PROGRAM_TILES_OVER_MEAN", 0.5)
    monkeypatch.setattr(lists, "SEGMENT_TILES_OVER_ROOT", 0)
    # a length of its own: plans are kept
    run(pattern, 1171, "packed_and_padded", (4, 2, 64), torch.bfloat16)


def repeated(pattern: str, times: int = 20):
    q, k, v = tensors((4, 2, 64), 1000, 1000, torch.bfloat16, "cuda")
    function = lambda *t: sparse_attention(*t, pattern, backend="fa", return_lse=True)  # noqa: E731
    return [oracle.gradients(function, q, k, v) for _ in range(times)]


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
def test_twenty_runs_differ_by_roundings_at_most():
    # gradients are added up in no fixed order; outputs and lse are the same each time
    runs = repeated("bigbird(block_size=64)")
    for later in runs[1:]:
        for one, other in zip(runs[0][:2], later[:2], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(runs[0][2:], later[2:], strict=True):
            assert (one.float() - other.float()).abs().max() <= 2**-7 * one.float().abs().max()


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
def test_where_torch_is_told_to_repeat_lists_are_refused():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(NotImplementedError, match="in no fixed order"):
            repeated("chunk(50)", 1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
def test_other_lengths_and_patterns_compile_nothing():
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def sizes():
        return [len(function.compile_cache.cache) for function in (_flash_attn_fwd, _flash_attn_bwd)]

    def step(pattern, length, batch=2):
        q, k, v = (t[:batch].requires_grad_() for t in tensors((4, 2, 64), length, length, torch.bfloat16, "cuda"))
        sparse_attention(q, k, v, pattern, backend="fa").sum().backward()

    step("chunk(50)", 1000)
    before = sizes()
    for pattern, length, batch in (
        ("chunk(50)", 1153, 2),
        ("bigbird(block_size=64)", 4000, 1),
        ("fixed(128, 8)", 700, 2),
    ):
        step(pattern, length, batch)
    assert sizes() == before


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
def test_only_lse_has_a_gradient():
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 64), 257, 257, torch.bfloat16, "cuda"))
    mask = oracle.dense_mask("chunk(50)", 257, 257)
    exact = oracle.attention(*(t.double().cpu() for t in (q, k, v)), mask)[1].sum()
    right = torch.autograd.grad(exact, (q, k, v), allow_unused=True)
    got = torch.autograd.grad(
        sparse_attention(q, k, v, "chunk(50)", backend="fa", return_lse=True)[1].sum(), (q, k, v), allow_unused=True
    )
    for one, other in zip(got[:2], right[:2], strict=True):
        torch.testing.assert_close(one.cpu().float(), other.cpu().float(), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
def test_a_compiled_model_runs_lists():
    def loss(q, k, v):
        return sparse_attention(q, k, v, "chunk(50)", backend="fa").float().square().sum()

    leaves = [t.requires_grad_() for t in tensors((4, 2, 64), 640, 640, torch.bfloat16, "cuda")]
    right = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash_attn_4")
def test_lists_are_chosen_where_they_were_faster():
    def chosen(pattern: str, length: int) -> bool:
        q = torch.empty(1, 16, length, 128, device="cuda", dtype=torch.bfloat16)
        return BACKENDS["fa"].is_fastest(call_of(q, q, q, build_plan(pattern, length, device="cuda")))

    assert chosen("bigbird(block_size=128)", 65_536)
    assert not chosen("bigbird(block_size=128)", 16_384) and not chosen("chunk(50)", 65_536)
