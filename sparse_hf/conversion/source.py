"""Find a checkpoint and read its headers before any work: a folder, or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME, logging

from .carry import CARD, carried_files, has_tokenizer, read_json
from .hub import FORMS, HERE, Place, fetch, is_id
from .shards import Shard, Stored, read_shard

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk whose files are whole; `name` is what people call it, `repo` where it was fetched."""

    name: str
    folder: Path
    config: dict
    shards: tuple[Shard, ...]
    repo: str | None = None

    @property
    def tensors(self) -> Iterator[Stored]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def carried(self) -> list[Path]:
        """The files that travel with the weights."""
        return carried_files(self.folder, self.config)


def find_source(source: str | Path, place: Place = HERE) -> Source:
    """The checkpoint in a folder, or of a hub id, which is downloaded.

    Raises:
        FileNotFoundError: neither a folder nor a reachable repository, or no checkpoint in it.
        ValueError: a file, a revision of a folder, or a damaged checkpoint.
    """
    folder, text = Path(source), str(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; give the folder that holds it, {folder.absolute().parent}")
    if folder.is_dir():
        if place.revision is not None:
            raise ValueError(f"revision={place.revision!r} is for hub ids, and {source} is a folder; leave it out")
        return open_source(folder / place.subfolder, (folder / place.subfolder).resolve().name)
    if not is_id(text):
        raise FileNotFoundError(
            f"{source} is no folder with a checkpoint, no .gguf file and no hub id (owner/name or name)"
        )
    return replace(open_source(fetch(text, place), text), repo=text)


def open_source(folder: Path, name: str) -> Source:
    """Read the configuration and the header of every file of weights.

    Raises:
        FileNotFoundError: no configuration, no weights, or a shard that the index names is missing.
        ValueError: a file that is cut off or is not what its name says.
    """
    config = _config(folder)
    return Source(name, folder, config, tuple(read_shard(shard) for shard in _shards(folder)))


def check_folder(folder: Path, *, weights: bool = True, tokenizer: bool = False) -> None:
    """Raise what is wrong with a checkpoint's files, which names the file; of the weights, headers are read.

    Args:
        folder: of the checkpoint.
        weights: they have to be there; else they may be absent, and are checked where they are not.
        tokenizer: it has to be there too.

    Raises:
        FileNotFoundError: no configuration, weights or tokenizer, or a shard that the index names is missing.
        ValueError: a file that is cut off or is not what its name says.
    """
    config = _config(folder)
    if weights or any((folder / name).exists() for form in FORMS for name in form):
        for shard in _shards(folder):
            read_shard(shard)
    carried = carried_files(folder, config)
    if not tokenizer:
        return
    if not has_tokenizer(carried, folder):
        raise FileNotFoundError(
            f"{folder} has no tokenizer; save one there: AutoTokenizer.from_pretrained(MODEL).save_pretrained({str(folder)!r})"
        )
    for path in carried:
        if path.parent == folder and path.name.startswith("tokenizer") and path.suffix == ".json":
            read_json(path)


def _config(folder: Path) -> dict:
    """What `config.json` holds, once it is known that what Transformers reads beside it is readable too."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a saved checkpoint")
    config = _with_floats(read_json(path))
    if not config.get("model_type"):
        raise ValueError(f'{path} names no model_type, so its family is unknown; add it, like "model_type": "bert"')
    if (folder / GENERATION_CONFIG_NAME).is_file():
        read_json(folder / GENERATION_CONFIG_NAME)
    return config


def _with_floats(value: Any) -> Any:
    """A configuration with the infinities that Transformers writes as `{"__float__": "Infinity"}`, which JSON has not."""
    if isinstance(value, dict):
        return (
            float(value["__float__"]) if set(value) == {"__float__"} else {k: _with_floats(v) for k, v in value.items()}
        )
    return [_with_floats(v) for v in value] if isinstance(value, list) else value


def card_metadata(folder: Path) -> dict:
    """`license` and `base_model` of the model card in a folder, as far as it has them."""
    path = folder / CARD
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, YAMLError) as error:
        logger.warning(
            "the metadata of %s cannot be read (%s); license and base model are not taken from it", path, error
        )
        return {}
    return {key: data[key] for key in ("license", "base_model") if data.get(key)}


def _shards(folder: Path) -> tuple[Path, ...]:
    for index, single in FORMS:
        if (folder / index).exists():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing or not names:
                raise FileNotFoundError(f"{folder / index} names {missing or 'no files'}, which are not in the folder")
            return tuple(folder / name for name in names)
        if (folder / single).exists():
            return (folder / single,)
    singles = " nor ".join(single for _, single in FORMS)
    raise FileNotFoundError(f"{folder} has no weights: neither {singles}, nor an index of either")
