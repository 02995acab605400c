"""What `make zoo` has written, and what it minds."""

from __future__ import annotations

import json

import pytest
import transformers

import sparse_hf
from tests.zoo.__main__ import FILES, JSON, OLDEST, TEXT, worse
from tests.zoo.trial import answer

TYPES = json.loads(JSON.read_text(encoding="utf-8"))["types"]
# what works with the version that is installed
FILE = FILES.get(transformers.__version__)
HERE = {} if FILE is None or not FILE.exists() else json.loads(FILE.read_text(encoding="utf-8"))["types"]
# a decoder, layers of another kind, sinks, two stacks, images, sounds; two of the table, and three that are refused
SOME = ("glm", "lfm2", "gpt_oss", "mt5", "dinov2", "wav2vec2", "bert", "mpnet", "longt5", "llava", "xlnet")


def test_its_files_agree():
    derived = [name for name, entry in TYPES.items() if entry["status"] == "derived"]
    assert derived == sparse_hf.derived_types()
    page = TEXT.read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name, entry in TYPES.items() if entry["status"] != "verified")


def test_its_files_name_no_place_of_a_machine():
    for path in (JSON, OLDEST, TEXT):
        assert "site-packages" not in path.read_text(encoding="utf-8")


@pytest.mark.skipif(not HERE, reason="written with other versions of Transformers")
@pytest.mark.parametrize("name", SOME)
def test_some_types_are_what_it_says(name):
    assert answer(name) == HERE[name]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"status": "derived", "cache": True}, []),
        ({"status": "derived", "cache": False}, ["one: cache worked, and gives False"]),
        ({"status": "verified"}, []),
        ({"status": "refused", "reason": "so"}, ["one worked, and is refused: so"]),
    ],
)
def test_a_type_that_works_no_more_is_minded(now, said):
    assert worse("one", {"status": "derived", "cache": True, "padding": False}, now) == said
    assert worse("one", {}, now) == []
