"""Patterns read as windows, strides, marked tokens and hashes; or the reason why they are none."""

from __future__ import annotations

import pytest

from sparse_hf import Pattern, Window
from sparse_hf.pattern.forms import MarkedForm, StrideForm, content_terms, read_marked, read_stride


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("window(3, 3)", "no stride"),
        ("stride(1)", "no stride"),
        ("stride(3) | stride(5)", "or several"),
        ("stride(3) & marked_queries()", r"marked_queries\(\) is part of a stride"),
        ("stride(3) | chunk(9)", r"beside the stride: chunk\(9, 0, 0\) is neither"),
        ("stride(3) | first(2) & window(9, 0)", r"reaches further than the global tokens, window\(9, 0\)"),
        ("stride(3) & window(9, 0) | window(9, 0)", r"window\(9, 0\) holds all strided pairs"),
    ],
)
def test_what_is_no_stride_says_why(pattern, message):
    found = read_stride(Pattern.parse(pattern), 100)
    assert isinstance(found, str)
    assert message.replace("\\", "") in found, found


def test_dilation_becomes_a_window():
    found = read_stride(Pattern.parse("window(60, 30) & stride(7) | window(20, 6)"), 100)
    assert isinstance(found, StrideForm)
    assert str(found.side_by_side) == "window(8, 4) & outside(window(2, 0))"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("window(9, 14) | marked_keys()", MarkedForm(Window(9, 14), True, False)),
        ("window(20, 0) | marked()", MarkedForm(Window(20, 0), True, True)),
        ("marked_queries()", MarkedForm(None, False, True)),
        # what marks say nothing of, or not alone, or not everywhere
        ("window(9, 14)", None),
        ("window(9, 14) | first(2) | marked()", None),
        ("window(9, 0) | marked() & window(None, 0)", None),
        ("per_head(window(9, 14) | marked(), window(3, 3) | marked())", None),
        ("window(64, 64) & stride(2) | marked()", None),
    ],
)
def test_marked_forms(text, form):
    assert read_marked(text) == form


def test_terms_of_a_pattern():
    found = content_terms(Pattern.parse("(window(5, 0) | lsh(4, 2)) & window(None, 0) | first(1)"))
    assert [tuple(map(str, term)) for term in found] == [
        ("None", "window(5, 0) & window(None, 0)"),
        ("lsh(4, 2, 64, 0)", "window(None, 0)"),
        ("None", "first(1)"),
    ]
    assert Pattern.parse("lsh([4, 6], 2)") == Pattern.parse("lsh((4, 6), 2, 64, 0)")
