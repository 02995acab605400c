"""The laws of the algebra, on random compositions; closed forms against brute force."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_hf import (
    FULL,
    BlockTable,
    Chunk,
    First,
    Fixed,
    Last,
    Marked,
    MarkedKeys,
    MarkedQueries,
    Outside,
    Pattern,
    PatternError,
    PerHead,
    RandomBlocks,
    Stride,
    Summary,
    Window,
    causal,
    full,
    recipes,
)
from sparse_hf.pattern.base import Marks
from tests.table import PATTERNS

N = 40
Q, K = torch.arange(N)[:, None], torch.arange(N)[None, :]
MARKED = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.15
BOXES = 1200
small = st.integers(0, 12)
limit = st.none() | small
size = st.integers(1, 12)
primitives = st.one_of(
    st.builds(Window, limit, limit),
    st.builds(First, small),
    st.builds(Marked),
    st.builds(MarkedKeys),
    st.builds(MarkedQueries),
    st.builds(Stride, size),
    size.flatmap(lambda b: st.builds(Fixed, st.just(b), st.integers(0, b))),
    size.flatmap(lambda b: st.builds(Summary, st.just(b), st.integers(1, b))),
    st.builds(Chunk, size, small, small),
    st.builds(Last, small, size),
    st.builds(RandomBlocks, st.integers(1, 4), size, st.integers(0, 2**40)),
    st.builds(BlockTable, size, st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=8).map(tuple)),
)
patterns = st.recursive(
    primitives,
    lambda p: st.builds(Pattern.__or__, p, p) | st.builds(Pattern.__and__, p, p) | st.builds(Outside, p),
    max_leaves=5,
)
law = settings(max_examples=100, derandomize=True, deadline=None)


def pairs(pattern: Pattern) -> torch.Tensor:
    allowed = pattern.allows(Q, K, Marks(MARKED[:, None], MARKED[None, :], N))
    assert allowed.shape == (N, N) and allowed.dtype == torch.bool
    return allowed


@law
@given(patterns, patterns, patterns)
def test_union_and_intersection_are_those_of_sets(a, b, c):
    assert torch.equal(pairs(a | b), pairs(a) | pairs(b))
    assert torch.equal(pairs(a & b), pairs(a) & pairs(b))
    assert torch.equal(pairs(a | b), pairs(b | a)) and torch.equal(pairs(a & b), pairs(b & a))
    assert torch.equal(pairs((a | b) | c), pairs(a | (b | c))) and torch.equal(pairs((a & b) & c), pairs(a & (b & c)))
    assert torch.equal(pairs(a & (b | c)), pairs((a & b) | (a & c)))
    assert torch.equal(pairs(a | a), pairs(a)) and torch.equal(pairs(a & full()), pairs(a))
    assert torch.equal(pairs(a | (a & b)), pairs(a))


@law
@given(patterns, patterns)
def test_outside_is_the_complement(a, b):
    assert torch.equal(pairs(Outside(a)), ~pairs(a))
    assert torch.equal(pairs(Outside(a | b)), pairs(Outside(a) & Outside(b)))


@law
@given(patterns, st.integers(0, 2**31))
def test_blocks_are_sound(pattern, seed):
    # 100 examples of 1,200 boxes are 120,000 states
    states, truth = states_and_truth(pattern, seed)
    wrong = ((states == 0) & (truth != 0)) | ((states == FULL) & (truth != FULL))
    assert not wrong.any(), f"{pattern}: {int(wrong.sum())} of {BOXES} states"


def states_and_truth(pattern: Pattern, seed: int):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, N, (4, BOXES), generator=generator)
    # half of the boxes are small, where EMPTY and FULL are common
    ends[1, : BOXES // 2] = (ends[0] + ends[1] % 4).clamp(max=N - 1)[: BOXES // 2]
    ends[3, : BOXES // 2] = (ends[2] + ends[3] % 4).clamp(max=N - 1)[: BOXES // 2]
    q0, q1, k0, k1 = *ends[:2].sort(0).values, *ends[2:].sort(0).values
    marks = torch.nn.functional.pad(MARKED.long().cumsum(0), (1, 0))
    of_range = [((marks[b + 1] - marks[a] > 0).int() + (marks[b + 1] - marks[a] == b - a + 1).int()).to(torch.int8)
                for a, b in ((q0, q1), (k0, k1))]  # fmt: skip
    sums = torch.nn.functional.pad(pairs(pattern).long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    held = sums[q1 + 1, k1 + 1] - sums[q0, k1 + 1] - sums[q1 + 1, k0] + sums[q0, k0]
    truth = torch.where(held == 0, 0, torch.where(held == (q1 - q0 + 1) * (k1 - k0 + 1), 2, 1))
    return pattern.blocks(q0, q1, k0, k1, Marks(*of_range, N)), truth


@pytest.mark.parametrize(
    "text",
    [
        "window(5, 0)",
        "first(3)",
        "chunk(7)",
        "chunk(3, 2, 1)",
        "last(2, 7)",
        "stride(3)",
        "outside(window(5, 0))",
        "block_table(4, ((0, 2), (1,)))",
    ],
)
def test_blocks_of_primitives_are_exact(text):
    states, truth = states_and_truth(Pattern.parse(text), 0)
    assert torch.equal(states.long(), truth)


@law
@given(patterns)
def test_blocks_of_a_grain_are_full_or_empty(pattern):
    side = pattern.grain or 7
    # nothing is marked, and the last block is whole
    whole = N // side * side
    held = pattern.allows(Q[:whole], K[:, :whole], Marks(length=whole)).view(whole // side, side, whole // side, side)
    mixed = held.any(3).any(1) & ~held.all(3).all(1)
    assert not mixed.fill_diagonal_(False).any()


@law
@given(patterns, st.sampled_from([1, 4, 8, 16]))
def test_squares_with_one_signature_hold_the_same_pairs(pattern, side):
    # every square of unmarked tokens, inside and outside the first N
    first = torch.arange(3 * N - side)
    q0, k0 = torch.cartesian_prod(first, first).unbind(1)
    signature = pattern.signature(q0, k0, side, Marks(length=2 * N))
    if signature is None:
        return
    rows = torch.stack([torch.zeros_like(q0), *signature], 1)
    _, which = rows.unique(dim=0, return_inverse=True)
    example = torch.zeros_like(which).scatter_(0, which, torch.arange(len(which)))[which]
    place = torch.arange(3 * N)
    held = pattern.allows(place[:, None], place[None, :], Marks(length=2 * N))
    squares = held.unfold(0, side, 1).unfold(1, side, 1)[: len(first), : len(first)].reshape(len(q0), side, side)
    assert torch.equal(squares, squares[example])


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("window(30, 0)", 32 + 2 * 16 - 1),
        ("first(3)", 16),
        ("marked()", 1),
        ("window(None, None)", 1),
        ("stride(7)", 7),
    ],
)
def test_signatures_tell_few_squares_apart(text, kinds):
    q0, k0 = torch.cartesian_prod(torch.arange(100), torch.arange(100)).unbind(1)
    signature = Pattern.parse(text).signature(q0, k0, 16, Marks(length=116))
    assert len(torch.stack([torch.zeros_like(q0), *signature], 1).unique(dim=0)) == kinds


@law
@given(patterns)
def test_reachable_is_sound(pattern):
    later = pairs(pattern).flip(0).cummax(0).values.flip(0)
    reachable = pattern.reachable(K, Q)
    assert not (later & ~reachable).any()


def test_reachable_forgets_what_a_window_left_behind():
    assert not Window(4, 0).reachable(torch.tensor(0), torch.tensor(5))
    assert (Window(4, 0) | First(1)).reachable(torch.tensor(0), torch.tensor(5))


@law
@given(patterns)
def test_text_form_round_trips(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert hash(Pattern.parse(repr(pattern))) == hash(pattern)


@law
@given(st.lists(patterns, min_size=1, max_size=3))
def test_text_form_of_heads_round_trips(heads):
    pattern = PerHead(*heads)
    assert Pattern.parse(str(pattern)) == pattern and pattern.heads == tuple(heads)


@pytest.mark.parametrize("text", PATTERNS)
def test_scalars_give_the_same_answer(text):
    # kernels ask one pair at a time
    parsed = Pattern.parse(text)
    for pattern in parsed.heads or (parsed,):
        whole = pattern.allows(Q, K)
        for q, k in ((0, 0), (17, 3), (3, 17), (39, 38)):
            assert pattern.allows(torch.tensor(q), torch.tensor(k)) == whole[q, k]


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (3, 0), (3, 7), (5, 2**40)])
def test_random_blocks_draw_distinct_blocks_whatever_the_length(count, seed):
    pattern = RandomBlocks(count, 4, seed)
    blocks = torch.arange(0, 4 * 128, 4)
    drawn = pattern.allows(blocks[:, None], blocks[None, :])
    # all of the range is in view for the blocks below a power of two
    expected = torch.tensor([min(count, 1 << b.bit_length() if b else 1) for b in range(64)])
    assert torch.equal(drawn[:64].sum(1), expected)
    assert torch.equal(RandomBlocks(count, 4, seed).allows(blocks[:64, None], blocks[None, :64]), drawn[:64, :64])
    if count < 5:
        assert not torch.equal(RandomBlocks(count, 4, seed + 1).allows(blocks[:, None], blocks[None, :]), drawn)


def test_values_are_frozen_and_have_no_truth():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(1, 2).left = 3
    with pytest.raises(AttributeError, match="frozen"):
        PerHead(First(1)).extra = 3
    for pattern in (Window(1, 0), Window(1, 0) | First(2), PerHead(First(1))):
        with pytest.raises(TypeError, match=r"write \| for union and & for intersection"):
            bool(pattern)


def test_recipes_say_what_their_papers_say():
    assert recipes.longformer(attention_window=512) == Window(256, 256) | First(1)
    assert recipes.longformer(512, 1, dilation=2) == Window(512, 512) & Stride(2) | First(1)
    assert recipes.sliding_window(4096) == Window(4095, 0)
    assert recipes.streaming(window=8, sinks=2) == Window(7, 0) | First(2) & causal()
    assert recipes.sparse_transformer(128, "strided") == (Window(128, 0) | Stride(128)) & causal()
    ends = First(16) | Last(1, 16)
    assert Pattern.parse("bigbird(block_size=16)") == Chunk(16, 1, 1) | ends | RandomBlocks(3, 16, 0)
    with pytest.raises(ValueError, match="'strided' or 'fixed'"):
        recipes.sparse_transformer(mode="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windw(1, 2)", r"column 1: unknown word 'windw'; did you mean 'window'\? The known words are window, first"),
        ("window(1, 2) | frst(3)", r"column 16: unknown word 'frst'"),
        ("window(1, 2, 3)", r"column 1: window: too many positional arguments; the form is window\(left, right\)"),
        ("window(1)", r"missing a required argument"),
        ("first(n=1, m=2)", r"unexpected keyword argument 'm'; the form is first\(n\)"),
        ("window(1, 0) or first(2)", r"column 14: write '\|' instead of 'or'"),
        ("window(1, 0) and first(2)", r"column 14: write '&' instead of 'and'"),
        ("not window(1, 0)", r"is not a pattern"),
        ("window", r"'window' needs its arguments: window\(left, right\)"),
        ("5", r"'5' is not a pattern"),
        ("window(a, 0)", r"column 8: 'a' is not a value"),
        ("window(1.5, 0)", r"column 8: '1.5' is not a value"),
        ("window(-1, 0)", r"left is -1; it must be a whole number of at least 0"),
        ("window(True, 0)", r"left is True; it must be a whole number"),
        ("stride(0)", r"step is 0; it must be a whole number of at least 1"),
        ("fixed(4, 5)", r"summary is 5; it must be at most block, 4"),
        ("__import__('os').system('true')", r"is not a pattern"),
        ("window(1, 0) |", r"invalid syntax"),
        ("window(1, 0", r"never closed"),
        ("per_head(first(1)) | first(2)", r"per_head stands outermost"),
        ("outside(per_head(first(1)))", r"per_head stands outermost"),
        ("outside(3)", r"'3' is not a pattern"),
        ("per_head(per_head(first(1)))", r"per_head stands outermost"),
        ("", r"the pattern is empty; the known words are"),
        ("(" * 3000 + ")" * 3000, r"too many nested|nested too deeply"),
        ("first(1) |" * 20_000, r"at most 100,000 are read"),
        (17, r"a pattern is text like"),
    ],
)
def test_errors_say_where_and_what_to_do(text, message):
    with pytest.raises(PatternError, match=message):
        Pattern.parse(text)
