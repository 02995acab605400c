"""How the package is installed: one sentence says it, and nobody is told to take its name from a package index."""

from __future__ import annotations

import re
import runpy

from transformers.dynamic_module_utils import get_imports

import sparse_hf
from sparse_hf.conversion.card import write_card
from sparse_hf.version import HOW_TO_INSTALL, __version__
from tests.models.families import dense_model
from tests.processes import ROOT

FROM_AN_INDEX = re.compile(r"pip install [\"'`]?sparse[-_]hf")
SPOKEN = ["sparse_hf/**/*.py", "examples/**/*.py", "model_cards/*.md", "*.md", "docs/**/*.md", "setup.py"]


def test_no_text_names_an_index():
    files = [path for pattern in SPOKEN for path in ROOT.glob(pattern)]
    assert len(files) > 100
    assert [path for path in files if FROM_AN_INDEX.search(path.read_text(encoding="utf-8"))] == []


def test_what_strangers_read(tmp_path):
    assert __version__ in HOW_TO_INSTALL and "source" in HOW_TO_INSTALL
    sparse_hf.sparsify(dense_model("BertModel"), "window(4, 4)").save_pretrained(tmp_path)
    assert HOW_TO_INSTALL in write_card(tmp_path).read_text()
    code = tmp_path / "modeling_sparse_hf.py"
    # Transformers would tell people to install what it finds to be missing; `tests/models/test_anywhere.py` sees what is said
    assert get_imports(code) == []
    assert runpy.run_path(str(code))["SparseBertModel"] is sparse_hf.SparseBertModel


def test_texts_name_this_version():
    assert re.search(rf"^version: {re.escape(__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
