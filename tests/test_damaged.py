"""Every command that loads a folder says in one line what is damaged in it, and ends with code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

import sparse_hf
from tests.models.families import dense_model
from tests.test_cli import run
from tests.test_talk import tokenizer

WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"
PATTERN = ("--pattern", "window(20, 0)")
# what is read of a dense folder (D) or of a sparse one (S); these need its weights,
LOADING = {
    "convert": ("convert", "D", "out", *PATTERN),
    "dry run": ("convert", "D", "out", *PATTERN, "--dry-run"),
    "export": ("export", "S", "out", "--to", "dense"),
    "generate": ("generate", "S", "--prompt", "w5"),
    "chat": ("chat", "S"),
    "evaluate": ("evaluate", "D", *PATTERN),
    "evaluate beside": ("evaluate", "GOOD", "--pattern", "S"),
    "tune": ("tune", "D", *PATTERN),
    "bench generate": ("bench", "generate", "--model", "D"),
}
# these its configuration alone,
READING = {"card": ("card", "S"), "info": ("info", "S"), "show": ("show", "S")}
# and these also its tokenizer
SPEAKING = ("generate", "chat", "evaluate", "tune")


def cut(name: str, left: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:left])

    return damage


def listed(text: str) -> Callable[[Path], None]:
    """Weights that a list names, instead of one file."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)

    return damage


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


# how a folder is damaged, what is said, and of which commands
ALL = {**LOADING, **READING}
DAMAGES = {
    "half of the weights": (cut(WEIGHTS, 50_000), f"{WEIGHTS} has 50,000 bytes and its header promises", ALL),
    "four bytes of weights": (cut(WEIGHTS, 4), f"{WEIGHTS} has no readable header", ALL),
    "empty weights": (cut(WEIGHTS, 0), f"{WEIGHTS} is empty", ALL),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights: neither model.safetensors nor", LOADING),
    "a missing shard": (listed(json.dumps({"weight_map": {"a": SHARD}})), f"{INDEX} names ['{SHARD}'], which are not", ALL),
    "half of a list": (listed('{"weight_'), f"{INDEX} is not readable JSON", ALL),
    "half of a configuration": (cut("config.json", 50), "config.json is not readable JSON", ALL),
    "settings of generate": (cut("generation_config.json", 9), "generation_config.json is not readable JSON", ALL),
    "nothing": (emptied, "has no config.json; give the folder of a saved checkpoint", ALL),
    "no tokenizer": (without_tokenizer, "has no tokenizer; save one there: AutoTokenizer", SPEAKING),
    "half of a tokenizer": (cut("tokenizer.json", 60), "tokenizer.json is not readable JSON", SPEAKING),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two folders without damage: a dense one and a sparse one."""
    place = tmp_path_factory.mktemp("whole")
    dense = dense_model("LlamaForCausalLM")
    for name, model in (("dense", dense), ("sparse", sparse_hf.sparsify(dense, "window(20, 0)"))):
        model.save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    return place


@pytest.mark.parametrize(("damage", "message", "commands"), DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_one_line(damage, message, commands, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"D": tmp_path / "dense", "S": tmp_path / "sparse", "GOOD": whole / "dense"}
    for name in "DS":
        shutil.copytree(whole / folders[name].name, folders[name])
        damage(folders[name])
    for name in commands:
        done = run(*(str(folders.get(word, word)) for word in ALL[name]))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (name, done.stderr)
        assert done.stderr.startswith("error: ") and message in done.stderr and str(tmp_path) in done.stderr, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_what_a_library_says_of_damage_is_one_line(monkeypatch):
    """Of a download, whose files are read by others."""
    for error, said in (
        (SafetensorError("Error while deserializing header: header too small"), "header too small"),
        (ValueError("It is not known.\nPerhaps it is new.\n\nYou can install it."), "It is not known. Perhaps it is new."),
    ):  # fmt: skip

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
        done = run("info", "owner/name")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.endswith(f"{said}\n")


def test_a_mark_stands_below_what_is_wrong():
    done = run("show", "window(1, 2")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 3 and done.stderr.endswith("^\n")
