"""What travels with the weights: every file of a checkpoint that is neither a weight nor written anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

CARD = "README.md"
MODULES, TOKENIZER_CONFIG = "modules.json", "tokenizer_config.json"
# Sentence Transformers' settings of the model, under the names that its versions gave them
SENTENCE_CONFIG = "sentence_*_config.json"
# weights of any library, and lists of them
WEIGHTS = (
    "*.safetensors", "*.bin", "*.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.ggml",
    "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.mlmodel", "*.npz",
)  # fmt: skip
# written anew, or true of the old weights only
NOT_CARRIED = (
    "config.json", CARD, "conversion.json", "conversion.txt", "pattern.png", "results.json", "trainer_state.json",
    "adapter_config.json",
)  # fmt: skip
# weights for other libraries, what training left, version control
FOREIGN_FOLDERS = (
    ".*", "__pycache__", "onnx", "openvino", "coreml", "tflite", "original", "checkpoint-*", "global_step*", "runs",
    "wandb",
)  # fmt: skip
# files by which AutoTokenizer knows that there is a tokenizer
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "tekken.json", "vocab.txt", "vocab.json", "merges.txt",
    "*.bpe.model", "spiece.model", "*.tiktoken",
)  # fmt: skip


def carried_files(folder: Path, config: dict) -> list[Path]:
    """The files of a folder that travel; `config` is its `config.json`.

    Not among them are weights, files that are written anew, code of the model's own (`auto_map`), and folders that hold
    another model, unless `modules.json` names them as Sentence Transformers' modules.
    """
    code = _model_code(config)
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and _travels(path) and path.name not in code]
    modules = _module_folders(folder)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path not in modules):
        found += _files_below(inner)
    for inner in modules:
        found += sorted(path for path in inner.rglob("*") if path.is_file())
    return list(dict.fromkeys(found))


def carry(files: Iterable[Path], folder: Path, new: Path) -> None:
    """Copy files of `folder` to the same places in `new`."""
    for path in files:
        target = new / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if (folder / "adapter_config.json").is_file():
        logger.warning(
            "%s holds a PEFT adapter beside its weights, which does not travel; merge it into them first, or load it again "
            "onto the converted model",
            folder,
        )


def has_tokenizer(files: Iterable[Path], folder: Path) -> bool:
    """Is there a tokenizer among the files that lie in `folder` itself?"""
    names = [path.name for path in files if path.parent == folder]
    return any(fnmatch(name, pattern) for name in names for pattern in TOKENIZER_FILES)


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; the checkpoint is damaged")
    return content


def update_json(path: Path, **values) -> None:
    """Set keys of a JSON file, which is made if it is missing."""
    old = read_json(path) if path.is_file() else {}
    if any(key not in old or old[key] != value for key, value in values.items()):
        path.write_text(json.dumps({**old, **values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _travels(path: Path) -> bool:
    return not any(fnmatch(path.name, pattern) for pattern in (".*", *WEIGHTS, *NOT_CARRIED))


def _model_code(config: dict) -> set[str]:
    """Files with the classes that `auto_map` of a `config.json` names, like `modeling_sparse_hf.py`."""
    named = (config.get("auto_map") or {}).values()
    flat = [name for entry in named for name in (entry if isinstance(entry, list) else [entry]) if name]
    return {f"{name.rpartition('--')[2].rpartition('.')[0]}.py" for name in flat}


def module_names(file: Path) -> list[str]:
    """Folders of a `modules.json`, where Sentence Transformers keeps what comes after the model, in the order of use."""
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); the checkpoint is damaged") from error
    return [entry["path"] for entry in entries if isinstance(entry, dict) and entry.get("path")]


def _module_folders(folder: Path) -> list[Path]:
    paths = [folder / name for name in module_names(folder / MODULES)]
    inside = [path for path in paths if path.resolve().is_relative_to(folder.resolve()) and path.is_dir()]
    return list(dict.fromkeys(path for path in inside if path.resolve() != folder.resolve()))


def _files_below(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder):
        here = Path(place)
        if any(fnmatch(here.name, pattern) for pattern in FOREIGN_FOLDERS) or "config.json" in files:
            names.clear()
            continue
        names.sort()
        yield from (here / name for name in sorted(files) if not any(fnmatch(name, p) for p in (".*", *WEIGHTS)))
