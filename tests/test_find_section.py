"""The example that finds sections: what belongs to one, and how answers are counted."""

from __future__ import annotations

import json

import pytest
import torch

from examples import find_section
from examples.find_section import by_pieces, judged, sections, whole
from sparse_hf import sparsify
from tests.evaluation.tiny import tiny_model, tokenizer

TEXT = "before\n## One\nthe whale\n## Two\nthe court"


def test_sections_are_from_header_to_header():
    found = sections(TEXT, find_section.HEADER)
    assert [(one.header, TEXT[one.begin : one.end]) for one in found] == [
        ("## One", "## One\nthe whale\n"), ("## Two", "## Two\nthe court"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no line of the text is like"):
        sections("the whale", find_section.HEADER)


@torch.no_grad()
def test_sections_are_means_of_states_of_their_own_tokens():
    dense, tokens = tiny_model("BertModel"), tokenizer()
    model = sparsify(dense, "window(None, None) | marked()").eval()
    found = whole(model, TEXT, sections(TEXT, find_section.HEADER), find_section.HEADER, tokens)
    states = dense(**tokens(TEXT, return_tensors="pt")).last_hidden_state[0]
    # a token for each byte
    for one, part in zip(found, sections(TEXT, find_section.HEADER), strict=True):
        wanted = states[part.begin : part.end].mean(0)
        torch.testing.assert_close(one, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_pieces_belong_to_what_they_share_a_character_with(monkeypatch):
    monkeypatch.setattr(find_section, "DENSE", 12)
    embedded, shares = by_pieces(TEXT, sections(TEXT, find_section.HEADER), tiny_model("BertModel"), tokenizer())
    # 40 bytes, ten at a time; sections are 7 to 24 and 24 to 40
    assert len(embedded) == 4 and shares.tolist() == [[True, True, True, False], [False, False, True, True]]


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1]])
    # the first is right; of two that score as much the other stands before
    assert judged(scores, [0, 1]) == {"first": 0.5, "mean_1_by_rank": 0.75}


def test_bad_input(tmp_path):
    (tmp_path / "manual.txt").write_text(TEXT)
    (tmp_path / "asked.json").write_text(json.dumps([{"question": "who?", "section": "## Three"}]))
    with pytest.raises(ValueError, match="no section is headed '## Three'"):
        find_section.main(
            ["--tiny", "--text", str(tmp_path / "manual.txt"), "--questions", str(tmp_path / "asked.json")]
        )
    with pytest.raises(SystemExit):
        find_section.main(["--tiny", "--text", "manual.txt"])


def test_it_runs_in_small(tmp_path):
    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    found = find_section.main(["--tiny", "--out", str(out)])
    assert json.loads(out.read_text()) == found and len(found["ways"]) == 4
    assert find_section.main(["--plot-only", "--out", str(out), "--plot", str(picture)]) == found
    assert picture.stat().st_size > 5_000
