"""What ranks ask for: the pairs of each rank are those of the whole text, whatever the pattern.

The masks of plans over what a rank holds are compared with the mask of the whole text.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_hf.parallel import SplitText, find_needs, keys_sent
from sparse_hf.parallel.attention import batch_of
from sparse_hf.pattern import Pattern
from sparse_hf.plan import build_plan, of_batch
from tests import oracle

LENGTH, SIZES = 300, [70, 3, 121, 106]
# patterns, and whether ranks ask for some keys of others only
PATTERNS = {
    "window(9, 0) | first(2)": True,
    "window(90, 0)": True,
    "window(7, 5) | first(3)": True,
    "(window(5, 5) | first(1)) & window(8, 8)": True,
    "window(5, 5) | marked()": True,
    "marked_keys() | window(3, 3) | first(1)": True,
    "window(4, 4) | last(2)": True,
    "(chunk(16, 1) | first(3)) & causal()": True,
    "chunk(10, 1, 1) | first(4) | last(1, 10)": True,
    "window(40, 40) & stride(3)": True,
    "per_head(window(6, 0) | first(1), window(12, 2), (window(0, 0) | first(4)) & causal())": True,
    "fixed(16, 2) & causal()": False,
    "chunk(8) | random_blocks(8, 1, 0)": False,
    "full()": True,
}


def batches() -> dict[str, tuple]:
    """Padding, documents and marks `[B, N]` of some batches."""
    index, marks = torch.arange(LENGTH), torch.zeros(2, LENGTH, dtype=torch.bool)
    marks[0, [0, 150, 299]] = marks[1, [71, 72]] = True
    left = torch.stack((index >= 0, index >= 100))
    right = torch.stack((index < 290, index < 60))
    documents = torch.stack(
        ((index >= 72).int() + (index >= 200), (index >= 10).int() + (index >= 190) + (index >= 194))
    )
    padded = index < torch.tensor([[280], [300]])
    return {
        "bare": (None, None, None),
        "marked": (None, None, marks),
        "left": (left, None, marks & left),
        "right": (right, None, marks & right),
        "packed": (padded, documents, marks & padded),
    }


@pytest.mark.cross
@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("text", PATTERNS)
def test_a_rank_sees_what_it_sees_in_the_whole_text(text, name):
    pattern, given = Pattern.parse(text), batches()[name]
    split = SplitText(SIZES, 2, of_batch(*given))
    needs = find_needs(split, pattern)
    if name == "bare":
        assert (needs.why_not is None) == PATTERNS[text], needs.why_not
    if needs.why_not is not None:
        needs = find_needs(split, pattern, everything=True)
    whole = oracle.dense_mask(text, LENGTH, LENGTH, *given).expand(2, -1, -1, -1)
    for rank, size in enumerate(SIZES):
        left, right, begin = needs.left[rank], needs.right[rank], split.bounds[rank]
        own = torch.arange(begin, begin + size).expand(len(left), -1)
        index = torch.cat((left, own, right), 1).expand(2, -1)
        padding, documents, marks = batch_of(split, index[: len(left)], 2, torch.device("cpu")).tensors
        plan = build_plan(
            pattern,
            size,
            index.shape[1],
            q_offset=left.shape[1],
            key_padding_mask=padding,
            segment_ids=documents,
            marks=marks,
        )
        heads = list(plan.heads) or [0]
        has = plan.to_dense()[:, heads].expand(2, -1, -1, -1)
        wanted = whole[:, :, begin : begin + size]
        for row in range(2):
            is_wide = torch.isin(own[0], needs.wide.expand(2, -1)[row])
            held = index[row]
            here = wanted[row][:, :, held.clamp(min=0)] & (held >= 0)
            assert torch.equal(has[row][:, ~is_wide], here[:, ~is_wide].expand_as(has[row][:, ~is_wide]))
            # and nothing that is seen is missing
            assert torch.equal(here[:, ~is_wide].sum(-1), wanted[row][:, ~is_wide].sum(-1))


def test_what_is_asked_for_does_not_grow_with_the_text():
    for text in ("(window(1023, 0) | first(4)) & causal()", "window(256, 256) | first(2)"):
        most = [
            find_needs(SplitText([length // 8] * 8, 1, of_batch(None, None, None)), Pattern.parse(text)).most
            for length in (1 << 16, 1 << 20)
        ]
        assert most[0] == most[1] <= 1030


def test_the_table_of_the_guide_is_what_is_counted():
    page = (Path(__file__).parents[2] / "docs/how-to/many-gpus.md").read_text()
    pattern = Pattern.parse("(window(1023, 0) | first(4)) & causal()")
    # keys and values of 8 heads of 64, in two bytes each
    token = 2 * 8 * 64 * 2
    for ranks in (8, 16, 64, 128, 512):
        first, *others, last = keys_sent([2048] * ranks, pattern)
        assert set(others) == {1023} and last == 0
        mib = [f"{count * token / 2**20:.2f}" for count in (first, 1023)]
        assert f"| {ranks} | {first:,} | 1,023 | {mib[0]} | {mib[1]} |" in page


def test_patterns_that_go_by_heads_have_no_keys_to_count():
    with pytest.raises(ValueError, match="goes by heads"):
        keys_sent([100, 100], Pattern.parse("fixed(16, 2) & causal()"))
