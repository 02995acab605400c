"""Patterns whose pairs are chosen from queries and keys: values like all others, until they are asked for pairs."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import LSH, LSHChunks, Pattern, PatternError, Window, build_plan


def test_text_form_round_trips():
    for pattern in (
        LSH(8),
        LSH((4, 6), 3, 5, 1),
        LSHChunks(64),
        LSHChunks(64, 1, 1, 2, (4, 8), 7),
        Window(8, 0) | LSH(4, 2),
    ):
        assert Pattern.parse(str(pattern)) == pattern and hash(Pattern.parse(str(pattern))) == hash(pattern)
    assert LSH([4, 6]) == LSH((4, 6))


def test_what_positions_say_can_be_taken_apart():
    pattern = (Window(5, 0) | LSH(4, 2, 8)) & Window(None, 0)
    assert pattern.uses_content and pattern.without_content() == Window(5, 0) & Window(None, 0)
    assert LSH(4).without_content() is None and (LSH(4) & Window(5, 0)).without_content() is None
    # keys that a query may get beside those of positions
    assert pattern.most_keys == 2 * 2 * 8 and LSHChunks(64, 1, 1, 2).most_keys == 2 * 64 * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lsh(7)", "each hash has a bucket for both signs, so it must be even"),
        ("lsh(None)", "lsh: buckets is None; give their number"),
        ("lsh(8, 0)", "lsh: rounds is 0"),
        ("lsh_chunks(0)", "lsh_chunks: size is 0"),
        ("lsh_chunks(64, buckets=(4, 5))", "it must be even"),
        ("outside(lsh(8))", "chooses pairs from queries and keys; give a pattern of positions"),
    ],
)
def test_bad_values_are_refused(text, message):
    with pytest.raises(PatternError, match=message):
        Pattern.parse(text)


def test_they_cannot_be_asked_of_positions():
    token = torch.arange(4)
    with pytest.raises(ValueError, match="no plan can be made of positions alone"):
        LSH(8).allows(token[:, None], token)
    with pytest.raises(ValueError, match="pass the pattern itself"):
        build_plan("lsh(8)", 40)
