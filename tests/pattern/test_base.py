"""The laws of the algebra, on random compositions; closed forms against brute force."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_hf import FULL, First, Pattern, PerHead, Window, full
from sparse_hf.pattern.base import Marks
from tests.pattern.drawn import BOXES, K, N, Q, law, pairs, patterns, states_and_truth
from tests.table import PATTERNS


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
@given(patterns, st.integers(0, 2**31))
def test_blocks_are_sound(pattern, seed):
    # 100 examples of 1,200 boxes are 120,000 states
    states, truth = states_and_truth(pattern, seed)
    wrong = ((states == 0) & (truth != 0)) | ((states == FULL) & (truth != FULL))
    assert not wrong.any(), f"{pattern}: {int(wrong.sum())} of {BOXES} states"


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


@law
@given(patterns)
def test_reachable_is_sound(pattern):
    later = pairs(pattern).flip(0).cummax(0).values.flip(0)
    reachable = pattern.reachable(K, Q)
    assert not (later & ~reachable).any()


@law
@given(patterns)
def test_text_form_round_trips(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert hash(Pattern.parse(repr(pattern))) == hash(pattern)


@pytest.mark.parametrize("text", PATTERNS)
def test_scalars_give_the_same_answer(text):
    # kernels ask one pair at a time
    parsed = Pattern.parse(text)
    for pattern in parsed.heads or (parsed,):
        whole = pattern.allows(Q, K)
        for q, k in ((0, 0), (17, 3), (3, 17), (39, 38)):
            assert pattern.allows(torch.tensor(q), torch.tensor(k)) == whole[q, k]


def test_values_are_frozen_and_have_no_truth():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(1, 2).left = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        PerHead(First(1)).extra = 3
    for pattern in (Window(1, 0), Window(1, 0) | First(2), PerHead(First(1))):
        with pytest.raises(TypeError, match=r"write \| for union and & for intersection"):
            bool(pattern)
