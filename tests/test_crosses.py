"""What `make test` runs of crosses, and what it leaves to `make test-crosses`."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from tests.crosses import mark_rest, spanning


def test_a_sample_has_every_value_and_is_no_larger_than_need_be():
    cases = list(itertools.product("abcdefgh", range(3), ("yes", "no")))
    kept = [cases[number] for number in sorted(spanning(cases))]
    assert len(kept) == 8
    for axis in range(3):
        found = Counter(case[axis] for case in kept)
        assert set(found) == {case[axis] for case in cases}
        # no value stands for all
        assert max(found.values()) - min(found.values()) <= 1


def test_any_table_is_spanned_and_always_by_the_same_cases():
    drawn = random.Random(0)
    for _ in range(50):
        cases = [
            tuple((axis, drawn.randrange(2 + 3 * axis)) for axis in range(3)) for _ in range(drawn.randrange(1, 40))
        ]
        kept = spanning(cases)
        assert {value for number in kept for value in cases[number]} == {value for case in cases for value in case}
        assert spanning(cases) == kept


class Case:
    """What `mark_rest` reads of a test's case."""

    def __init__(self, nodeid, params, *markers):
        self.nodeid, self.markers = nodeid, {mark.name: mark.mark for mark in markers}
        self.callspec = type("CallSpec", (), {"params": params})

    def get_closest_marker(self, name):
        return self.markers.get(name)

    def add_marker(self, mark):
        self.markers[mark.name] = mark.mark


def cases_of(*markers, name="test_a"):
    return [
        Case(f"{name}[{head}-{size}]", {"head": head, "size": size}, *markers)
        for head, size in itertools.product("ab", ([1], [2], [1]))
    ]


def test_what_is_no_cross_and_what_other_targets_run_is_left_alone():
    items = cases_of() + cases_of(pytest.mark.cross, pytest.mark.slow) + cases_of(pytest.mark.cross, pytest.mark.gpu)
    mark_rest(items)
    assert not any("rest" in item.markers for item in items)


def test_each_test_has_a_sample_of_its_own():
    one, other = cases_of(pytest.mark.cross), cases_of(pytest.mark.cross("head"), name="test_b")
    pairs = cases_of(pytest.mark.cross(("head", "size")), name="test_c")
    sums = cases_of(pytest.mark.cross(by=lambda head, size: [size[0]]), name="test_d")
    mark_rest([*one, *other, *pairs, *sums])
    kept = [
        [item.callspec.params for item in cases if "rest" not in item.markers] for cases in (one, other, pairs, sums)
    ]
    assert [params["head"] for params in kept[0]] == ["a", "b"]
    assert sorted(params["size"] for params in kept[0]) == [[1], [2]]
    assert [params["head"] for params in kept[1]] == ["a", "b"]
    # one of the two that are equal
    assert len(kept[2]) == 4
    assert sorted(params["size"] for params in kept[3]) == [[1], [2]]


def test_a_case_that_is_asked_for_by_name_runs():
    alone = cases_of(pytest.mark.cross)[-1:]
    mark_rest(alone)
    assert "rest" not in alone[0].markers
