"""Conversion of decoders that get indexers: new weights, those that are there already, and what export leaves out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparse_hf
from sparse_hf.cli import app
from sparse_hf.conversion.export import export
from tests.models.families import dense_model

PATTERN, SIZES = "window(7, 0) | first(2) | topk(8, 'indexer')", {"heads": 2, "width": 12}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def of_indexers(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in found.items() if ".indexer." in name}


def loaded(folder: Path):
    made, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return made.eval()


@pytest.fixture
def dense(tmp_path) -> Path:
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def trained(dense, tmp_path) -> Path:
    """A sparse folder whose indexers are no new ones."""
    sparse = sparse_hf.sparsify(AutoModelForCausalLM.from_pretrained(dense), PATTERN, indexer=SIZES)
    sparse.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_new_weights_are_written_beside_the_others_and_are_the_same_each_time(dense, tmp_path):
    old, found = weights(dense), []
    for name in ("one", "other"):
        sparse_hf.convert(dense, tmp_path / name, PATTERN, indexer=SIZES, progress=False)
        found.append(weights(tmp_path / name))
    one, other = found
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (
        all(torch.equal(one[name], t) for name, t in old.items()) and one.keys() - old.keys() == of_indexers(one).keys()
    )
    sparse = loaded(tmp_path / "one")
    assert sparse.config.indexer == SIZES and sparse(torch.tensor([list(range(5, 60))])).logits.isfinite().all()
    report = json.loads((tmp_path / "one" / "conversion.json").read_text())
    assert report["new"] == {name: list(t.shape) for name, t in of_indexers(one).items()}
    assert any("train them with sparse_hf.train.train_indexer" in warning for warning in report["warnings"])
    assert "New, of indexers" in (tmp_path / "one" / "conversion.txt").read_text()


def test_weights_that_are_there_are_kept_if_they_fit(trained, tmp_path):
    other = "window(15, 0) | first(2) | topk(16, 'indexer')"
    sparse_hf.convert(trained, tmp_path / "kept", other, progress=False)
    old, new = of_indexers(weights(trained)), of_indexers(weights(tmp_path / "kept"))
    assert old.keys() == new.keys() and all(torch.equal(new[name], t) for name, t in old.items())
    assert loaded(tmp_path / "kept").config.indexer == SIZES
    assert not json.loads((tmp_path / "kept" / "conversion.json").read_text())["new"]
    # another size, and none at all
    sparse_hf.convert(trained, tmp_path / "larger", other, indexer={"heads": 4}, progress=False)
    assert loaded(tmp_path / "larger").config.indexer == {"heads": 4, "width": 12}
    sparse_hf.convert(trained, tmp_path / "without", "window(15, 0) | first(2)", progress=False)
    assert not of_indexers(weights(tmp_path / "without")) and loaded(tmp_path / "without")
    report = json.loads((tmp_path / "without" / "conversion.json").read_text())
    assert report["left_out"].keys() == old.keys()


def test_the_command_line_says_sizes(dense, tmp_path):
    command = ["convert", str(dense), str(tmp_path / "out"), "--pattern", PATTERN, "--layers", "0=dense"]
    done = CliRunner().invoke(app, [*command, "--indexer-heads", "3"])
    assert done.exit_code == 0, done.output
    sparse = loaded(tmp_path / "out")
    assert sparse.config.indexer == {"heads": 3, "width": 64}
    assert [hasattr(layer.self_attn, "indexer") for layer in sparse.model.layers][:2] == [False, True]


def test_exported_folders_have_none(trained, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    export(trained, tmp_path / "stock", "dense", progress=False)
    assert (
        not of_indexers(weights(tmp_path / "stock")) and type(loaded(tmp_path / "stock")).__name__ == "LlamaForCausalLM"
    )
    with pytest.raises(ValueError, match="has no native form"):
        export(trained, tmp_path / "native", "native", progress=False)


def test_sizes_without_a_pattern_that_uses_them_are_refused(dense, tmp_path):
    with pytest.raises(ValueError, match="no pattern has topk"):
        sparse_hf.convert(dense, tmp_path / "out", "window(7, 0)", indexer=SIZES, progress=False)
    assert not (tmp_path / "out").exists()


def test_neighbours_that_share_an_indexer_have_weights_of_one(dense, trained, tmp_path):
    command = ["convert", str(dense), str(tmp_path / "out"), "--pattern", PATTERN]
    done = CliRunner().invoke(app, [*command, "--indexer-heads", "3", "--indexer-share", "2"])
    assert done.exit_code == 0, done.output
    sparse, found = loaded(tmp_path / "out"), of_indexers(weights(tmp_path / "out"))
    assert sparse.config.indexer == {"heads": 3, "width": 64, "share": 2}
    wanted = {str(layer) for layer in range(0, sparse.config.num_hidden_layers, 2)}
    assert {name.split(".")[2] for name in found} == wanted
    # of indexers that are there, those of the first of each group are kept
    sparse_hf.convert(trained, tmp_path / "fewer", PATTERN, indexer={"share": 2}, progress=False)
    old, new = of_indexers(weights(trained)), of_indexers(weights(tmp_path / "fewer"))
    assert {name.split(".")[2] for name in new} == wanted and all(torch.equal(new[name], old[name]) for name in new)
