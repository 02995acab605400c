"""Texts that are no patterns, and what their errors say."""

from __future__ import annotations

import pytest

from sparse_hf import Pattern, PatternError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "windw(1, 2)",
            r"column 1: unknown word 'windw'; did you mean 'window'\? A pattern of your own is .*imported\n  windw",
        ),
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
        ("window(-1.5, 0)", r"column 8: '-1.5' is not a value"),
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
