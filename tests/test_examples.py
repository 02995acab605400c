"""The examples run, and the cards say what the results say."""

from __future__ import annotations

import ast
import hashlib
import json
import runpy
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples import assets, make_cards  # noqa: E402
from tests.processes import printed  # noqa: E402


def test_quickstart_runs():
    said = printed("import runpy; runpy.run_path('examples/quickstart.py', run_name='__main__')")
    assert "SparseLlamaForCausalLM" in said


# what examples may import: what users may; and what makes cards, reads GGUF files, tells encoders, and takes an evaluation apart
PUBLIC = {
    "sparse_hf", "sparse_hf.bench", "sparse_hf.evaluation", "sparse_hf.pattern", "sparse_hf.testing", "sparse_hf.train",
    "sparse_hf.units",
}  # fmt: skip
OF_EVALUATION = {
    f"sparse_hf.evaluation.{name}"
    for name in ("api", "budget", "choice", "pieces", "probes.recall", "search", "spending", "tune")
}
OTHERS = {
    "make_cards": {"sparse_hf.conversion.card"}, "export": {"sparse_hf.conversion.export"}, "checkpoints": {"sparse_hf.conversion.gguf"},
    "training": {"sparse_hf.models.hf.hearing"}, "study_healing_long": OF_EVALUATION, "study_tuning": OF_EVALUATION,
    "chosen_mass": {
        "sparse_hf.attention", "sparse_hf.evaluation.mass", "sparse_hf.evaluation.observe",
        "sparse_hf.conversion.positions", "sparse_hf.models.hf.register",
    },
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_import_public_names(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in found if name.partition(".")[0] == "sparse_hf"}
    assert ours <= PUBLIC | OTHERS.get(path.stem, set())


@pytest.mark.parametrize("spec", make_cards.CARDS, ids=lambda s: s["name"])
def test_cards_are_those_of_the_committed_results(spec):
    assert (ROOT / "model_cards" / f"{spec['name']}.md").read_text() == make_cards.card(spec)


def test_there_are_no_other_cards():
    assert {path.stem for path in (ROOT / "model_cards").iterdir()} == {spec["name"] for spec in make_cards.CARDS}


def test_cards_and_measurements_speak_of_the_same_patterns():
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    patterns = {spec["name"]: [span[1] for span in spec["spans"]] for spec in make_cards.CARDS}
    of_demo = [patterns[s["name"]] for s in make_cards.CARDS if "demo" in s]
    assert of_demo == [[demo["DECODER_PATTERN"]], [demo["ENCODER_PATTERN"]]]
    measured = json.loads((ROOT / make_cards.REAL_WEIGHTS).read_text())["checkpoints"]
    for spec in make_cards.CARDS:
        if "real_weights" in spec:
            narrow = next(m for m in measured[spec["real_weights"]]["measures"] if m["name"] == "narrow")
            # the last span is of layers without a window of their own
            assert patterns[spec["name"]][-1] == narrow["pattern"]


def test_assets_are_checked_by_hash(tmp_path, monkeypatch):
    archive = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as package:
        package.writestr("thing/a.txt", "hello")
        package.writestr("../outside.txt", "no")
    monkeypatch.setattr(assets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(assets, "_download", lambda asset, into: archive)
    right = hashlib.sha256(archive.read_bytes()).hexdigest()
    folder = assets.fetch(assets.Asset("pypi", "thing", "1.0", right, {"thing/a.txt": "a.txt"}))
    assert [p.name for p in folder.iterdir()] == ["a.txt"] and not (tmp_path / "outside.txt").exists()
    # a glob takes what matches, without its path
    found = assets.fetch(assets.Asset("pypi", "thing", "1.1", right, matching="*.txt"))
    assert sorted(p.name for p in found.iterdir()) == ["a.txt", "outside.txt"] and found.parent == tmp_path / "cache"
    assert not (tmp_path / "outside.txt").exists() and not (found.parent / "outside.txt").exists()
    with pytest.raises(RuntimeError, match="is pinned"):
        assets.fetch(assets.Asset("pypi", "thing", "2.0", "0" * 64, {"thing/a.txt": "a.txt"}))
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["thing-1.0", "thing-1.1"]


def test_the_demo_says_why_sparse_is_slower():
    why_slower = runpy.run_path(str(ROOT / "examples" / "demo.py"))["why_slower"]

    def took(*runs: float) -> dict:
        return {"seconds": sorted(runs)[1], "runs": runs}

    assert why_slower("decoder", took(3, 4, 5), took(2, 4, 6), 4096) is None
    assert "decoder: sparse took 4.5 s and dense 4.0, but their runs overlap" in why_slower(
        "decoder", took(3, 4, 5), took(4.4, 4.5, 9), 4096
    )
    assert "at 4,096 tokens the rest of the model takes" in why_slower("encoder", took(3, 4, 5), took(6, 7, 8), 4096)


def test_the_demo_says_why_a_process_holds_more_than_its_tensors():
    why_more = runpy.run_path(str(ROOT / "examples" / "demo.py"))["why_more_memory"]

    def held(peak: int | None, live: int) -> dict:
        return {"peak": peak and peak << 20, "live": live << 20}

    assert why_more("decoder", held(500, 220), held(400, 220)) is None
    assert why_more("decoder", held(None, 220), held(None, 220)) is None
    # tensors that are more are seen in the table
    assert why_more("decoder", held(400, 220), held(500, 300)) is None
    words = why_more("decoder", held(400, 220), held(500, 221))
    assert "sparse model held 500 MiB at most and that of the dense one 400 MiB" in words
    assert "the tensors of a pass 221 MiB and 220 MiB" in words
