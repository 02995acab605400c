"""Find a checkpoint and check it before any work: a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# what travels with the weights, besides the configuration
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk that passed the checks."""

    folder: Path
    config: dict
    shards: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)


def find_folder(source: str | Path) -> Path:
    """The local folder of `source`, downloaded if it is a hub id.

    Raises:
        FileNotFoundError: neither a folder nor a reachable repository.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise FileNotFoundError(f"{source} is no folder with a checkpoint, no .gguf file and no hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.bin", *CARRIED]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source} is no local folder and could not be fetched from the hub: {reason}"
        ) from error


def open_source(folder: Path) -> Source:
    """Read the configuration and check every file of weights.

    Raises:
        FileNotFoundError: no configuration, no weights, or a shard that the index names is missing.
        ValueError: a file that is cut off or is not what its name says.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a saved checkpoint")
    config = read_json(path)
    if not config.get("model_type"):
        raise ValueError(f'{path} names no model_type, so its family is unknown; add it, like "model_type": "bert"')
    shards = _shards(folder)
    for shard in shards:
        _check(shard)
    return Source(folder, config, shards)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; the checkpoint is damaged")
    return content


def _shards(folder: Path) -> tuple[Path, ...]:
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH, TORCH_INDEX)):
        if (folder / index).exists():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing or not names:
                raise FileNotFoundError(f"{folder / index} names {missing or 'no files'}, which are not in the folder")
            return tuple(folder / name for name in names)
        if (folder / single).exists():
            return (folder / single,)
    raise FileNotFoundError(f"{folder} has no weights: neither {SAFETENSORS} nor {TORCH}, nor an index of either")


def _check(shard: Path) -> None:
    """A safetensors file says in its header how long it is; a torch file is a zip archive or an old pickle."""
    size = shard.stat().st_size
    if shard.suffix != ".safetensors":
        if size == 0:
            raise ValueError(f"{shard} is empty; the checkpoint was only half written")
        return
    with shard.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        header = file.read(min(length, size))
    try:
        entries = json.loads(header)
        last = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{shard} has no readable header; the checkpoint was only half written") from error
    if 8 + length + last != size:
        raise ValueError(
            f"{shard} has {size:,} bytes and its header promises {8 + length + last:,}; it was only half written"
        )
