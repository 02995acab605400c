"""Conversion: what travels, what grows, and that nothing half-done is ever left to load."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import sparse_hf
from sparse_hf.convert import folder as folder_module
from sparse_hf.convert import weights as weights_module
from tests.models.families import HEADS, dense_model, inputs

PATTERN = "window(16, 16) | first(1)"


@pytest.fixture
def bert(tmp_path) -> Path:
    dense_model("BertForMaskedLM", max_position_embeddings=160).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_converts_and_answers_as_in_memory(head, tmp_path):
    dense = dense_model(head)
    dense.save_pretrained(tmp_path / "dense")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, layers="1=dense", progress=False)
    auto = "AutoModel" + head.removeprefix("Bert").removeprefix("Llama").removeprefix("Model")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "sparse").eval()
    assert type(loaded).__name__ == f"Sparse{head}" and loaded.config.architectures == [f"Sparse{head}"]
    batch = inputs(head)
    with torch.no_grad():
        wanted, found = sparse_hf.sparsify(dense, PATTERN, layers="1=dense")(**batch), loaded(**batch)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("shape", ["single", "sharded", "bin"])
def test_weights_keep_their_names_and_positions_are_tiled(shape, tmp_path):
    dense = dense_model("BertForMaskedLM", max_position_embeddings=160)
    source = tmp_path / "dense"
    dense.save_pretrained(source, max_shard_size="20KB" if shape == "sharded" else "1GB")
    if shape == "bin":
        torch.save(dense.state_dict(), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    before = dense.state_dict() if shape == "bin" else weights(source)
    sparse_hf.convert(source, tmp_path / "sparse", PATTERN, max_length=400, progress=False)
    after = weights(tmp_path / "sparse")
    assert after.keys() == before.keys()
    table = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(after[table], before[table][torch.arange(400) % 160])
    assert all(torch.equal(after[key], before[key]) for key in before if key != table)
    assert not list((tmp_path / "sparse").glob("*.bin"))
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse")
    assert model.config.max_position_embeddings == 400
    assert model(torch.ones(1, 390, dtype=torch.long)).logits.shape == (1, 390, 97)
    report = json.loads((tmp_path / "sparse" / "conversion.json").read_text())
    assert report["grown"] == {table: [[160, 32], [400, 32]]}


def test_tokenizer_and_generation_config_travel(tmp_path):
    dense = dense_model("LlamaForCausalLM")
    dense.generation_config.max_new_tokens = 7
    dense.save_pretrained(tmp_path / "dense")
    tokenizer = {"truncation": {"max_length": 512, "strategy": "LongestFirst"}, "model": {"type": "WordLevel"}}
    (tmp_path / "dense" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512, "pad_token": "x"}))
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "sliding_window(64)", max_length=2048, progress=False)
    written = {
        name: json.loads((tmp_path / "sparse" / name).read_text())
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    assert written["tokenizer.json"]["truncation"]["max_length"] == 2048
    assert written["tokenizer_config.json"] == {"model_max_length": 2048, "pad_token": "x"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert loaded.generation_config.max_new_tokens == 7 and loaded.config.max_position_embeddings == 2048


def test_a_sparse_checkpoint_converts_again(bert, tmp_path):
    sparse_hf.convert(bert, tmp_path / "one", PATTERN, progress=False)
    sparse_hf.convert(tmp_path / "one", tmp_path / "two", "window(3, 3)", progress=False)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "two")
    assert config.sparse_attention["patterns"] == {"sparse": "window(3, 3)"}
    assert config.architectures == ["SparseBertForMaskedLM"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern": "windw(1, 1)"}, ValueError, "unknown word 'windw'"),
        ({"layers": "0-5=dense"}, ValueError, "'0-5' is outside the model, which has layers 0-1"),
        ({"layers": "0-1=dense, 1=first(1)"}, ValueError, "layer 1 twice"),
        ({"layers": "zero=dense"}, ValueError, "'zero' is not a layer or a range"),
        ({"layers": "0"}, ValueError, "write RANGE=PATTERN"),
        ({"layers": ["first(1)"]}, ValueError, "has 1 patterns; the model has 2 layers"),
        ({"pattern": "per_head(first(1), first(2))"}, ValueError, "names 2 patterns; the model has 4 heads"),
        ({"max_length": 100}, ValueError, "max_length is 100; the checkpoint has 160 positions"),
        ({"max_length": True}, ValueError, "it must be a number of tokens"),
        (
            {"source": "/nowhere/at/all"},
            FileNotFoundError,
            "is no folder with a checkpoint, no .gguf file and no hub id",
        ),
        ({"source": "/nowhere/model.gguf"}, FileNotFoundError, "does not exist; give a .gguf file"),
    ],
)
def test_bad_input_leaves_nothing(arguments, error, message, bert, tmp_path):
    given = {"source": bert, "pattern": PATTERN, **arguments}
    with pytest.raises(error, match=message):
        sparse_hf.convert(given.pop("source"), tmp_path / "out", given.pop("pattern"), progress=False, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no header":
        file.write_bytes(b"\x00" * 4)
    elif how == "no weights":
        file.unlink()
    elif how == "missing shard":
        file.unlink()
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "cut config":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": how}))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("cut", ValueError, "its header promises .* only half written"),
        ("no header", ValueError, "no readable header; the checkpoint was only half written"),
        ("no weights", FileNotFoundError, "has no weights: neither"),
        (
            "missing shard",
            FileNotFoundError,
            r"names \['model-00001-of-00002.safetensors'\], which are not in the folder",
        ),
        ("no config", FileNotFoundError, "has no config.json"),
        ("cut config", ValueError, "is not readable JSON"),
        ("gpt2", ValueError, "'gpt2' has no sparse counterpart; supported are bert, llama"),
    ],
)
def test_a_damaged_source_is_refused_before_any_work(how, error, message, bert, tmp_path):
    damage(bert, how)
    with pytest.raises(error, match=message):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten_unless_asked(bert, tmp_path):
    sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    with pytest.raises(FileExistsError, match="is not empty; give another folder, or overwrite=True"):
        sparse_hf.convert(bert, tmp_path / "out", "window(1, 1)", progress=False)
    sparse_hf.convert(bert, tmp_path / "out", "window(1, 1)", progress=False, overwrite=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.sparse_attention["patterns"] == {"sparse": "window(1, 1)"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert", "out"]


def test_a_full_disk_is_told_before_and_on_the_way(bert, tmp_path, monkeypatch):
    class Little:
        free = 10

    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: Little)
    with pytest.raises(OSError, match="has 10 bytes free; the checkpoint needs"):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    monkeypatch.undo()

    def fails(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module, "save_file", fails)
    with pytest.raises(OSError, match="is full; about .* bytes are needed. Nothing was left behind"):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


KILLED = """
import sys, time
from sparse_hf.convert import weights as w
real = w.save_file
def slow(*a, **k):
    real(*a, **k)
    print("written", flush=True)
    time.sleep(60)
w.save_file = slow
import sparse_hf
sparse_hf.convert(sys.argv[1], sys.argv[2], "window(3, 3)", progress=False)
"""


def test_a_killed_conversion_leaves_nothing_that_loads_and_the_next_one_succeeds(tmp_path, caplog):
    dense_model("BertForMaskedLM").save_pretrained(tmp_path / "bert", max_shard_size="20KB")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "bert"), str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout.readline() == "written\n"
    # another one at the same time is refused
    with pytest.raises(FileExistsError, match=f"process {child.pid} is writing"):
        sparse_hf.convert(tmp_path / "bert", tmp_path / "out", PATTERN, progress=False)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    partial = next(p for p in tmp_path.iterdir() if "partial" in p.name)
    assert not (tmp_path / "out").exists() and not (partial / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(partial)
    sparse_hf.convert(tmp_path / "bert", tmp_path / "out", PATTERN, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert", "out"]
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")).__name__ == "SparseBertForMaskedLM"


def test_time_moves_on():
    # `_alive` must tell a finished process from a running one
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    time.sleep(0.01)
    assert folder_module._alive(os.getpid()) and not folder_module._alive(child.pid)
