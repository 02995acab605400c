"""`convert`: a dense checkpoint becomes a folder that loads as its sparse counterpart."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from ..models import Family, family_of
from ..version import __version__
from .folder import whole_folder
from .gguf import dequantise
from .progress import progress_bar
from .source import CARRIED, Source, find_folder, open_source, read_json
from .weights import stream

__all__ = ["convert"]

logger = logging.get_logger(__name__)

REPORT = "conversion.json"


def convert(
    source: str | Path,
    out: str | Path,
    pattern,
    *,
    layers=None,
    max_length: int | None = None,
    global_token_ids=(),
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the sparse counterpart of a dense checkpoint.

    Weights keep their names and are copied shard by shard; the model is never built (but for GGUF, which Transformers
    dequantises). Learned tables of positions are grown by tiled copy. The folder is written under another name and renamed
    when it is whole.

    Args:
        source: a folder, a `.gguf` file, or a hub id.
        out: the folder to write.
        pattern: a `Pattern` or its text.
        layers: which layers get another pattern, see `sparse_hf.parse_layers`.
        max_length: positions of the result; by default as many as before.
        global_token_ids: token ids that `marked()` speaks of wherever they occur.
        overwrite: replace `out` if it holds something.
        progress: show a progress bar.

    Returns:
        The folder; `AutoModel.from_pretrained` gives the sparse class after `import sparse_hf`.

    Raises:
        FileNotFoundError, FileExistsError: what to read is missing, what to write is there.
        ValueError: an unsupported family, a bad pattern or layer list, a damaged checkpoint.
        OSError: the disk is full.
    """
    if Path(source).suffix == ".gguf":
        return _convert_gguf(Path(source), out, pattern, layers, max_length, global_token_ids, overwrite, progress)
    found = open_source(find_folder(source))
    family = family_of(found.config["model_type"])
    config = family.config_class.from_dense(found.config, pattern, layers, global_token_ids)
    config.architectures = [
        family.architectures.get(name, name)
        for name in found.config.get("architectures") or [family.classes[0].__name__]
    ]
    positions = _new_positions(config, family, max_length)
    with (
        whole_folder(Path(out), overwrite, _bytes_needed(found, positions)) as folder,
        progress_bar(found.bytes, f"converting {Path(source).name}", progress) as advance,
    ):
        grown = stream(found, folder, family, positions, advance)
        _carry(found.folder, folder, max_length)
        report = _report(source, config, grown, max_length, family)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        # last, so that a folder without it never loads
        config.save_pretrained(folder)
    return Path(out)


def _convert_gguf(file: Path, out, pattern, layers, max_length, global_token_ids, overwrite, progress) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a .gguf file, a folder or a hub id")
    with (
        whole_folder(Path(out), overwrite, 8 * file.stat().st_size) as folder,
        tempfile.TemporaryDirectory(dir=folder) as dense,
    ):
        logger.warning("dequantising %s to float32, which takes a minute or so", file.name)
        dequantise(file, Path(dense))
        convert(
            dense,
            folder / "sparse",
            pattern,
            layers=layers,
            max_length=max_length,
            global_token_ids=global_token_ids,
            progress=progress,
        )
        report = read_json(folder / "sparse" / REPORT)
        (folder / "sparse" / REPORT).write_text(json.dumps({**report, "source": file.name}, indent=2) + "\n")
        for written in (folder / "sparse").iterdir():
            shutil.move(written, folder / written.name)
        (folder / "sparse").rmdir()
    return Path(out)


def _new_positions(config, family: Family, max_length: int | None) -> int | None:
    """Set the configuration's length; the new length of learned tables, or None if nothing grows."""
    if max_length is None or not hasattr(config, "max_position_embeddings"):
        return None
    counted = family.positions.offset if family.positions.counted else 0
    old = config.max_position_embeddings
    if max_length + counted == old:
        return None
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}; it must be a number of tokens")
    if max_length + counted < old:
        raise ValueError(
            f"max_length is {max_length}; the checkpoint has {old} positions, and cutting them off loses weights"
        )
    config.max_position_embeddings = max_length + counted
    return max_length if family.positions.tables else None


def _bytes_needed(source: Source, positions: int | None) -> int:
    table = 4 * (positions or 0) * source.config.get("hidden_size", 0)
    return source.bytes + table + (16 << 20)


def _carry(old: Path, new: Path, max_length: int | None) -> None:
    """The tokenizer and the generation configuration, with the new length in the tokenizer's."""
    for name in CARRIED:
        if (old / name).is_file():
            shutil.copyfile(old / name, new / name)
    if max_length is None:
        return
    settings = new / "tokenizer_config.json"
    if settings.exists():
        settings.write_text(json.dumps({**read_json(settings), "model_max_length": max_length}, indent=2) + "\n")
    tokenizer = new / "tokenizer.json"
    if tokenizer.exists():
        content = read_json(tokenizer)
        if content.get("truncation"):
            content["truncation"]["max_length"] = max_length
            tokenizer.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _report(source, config, grown: dict, max_length: int | None, family: Family) -> dict:
    rotary = max_length is not None and not family.positions.tables
    return {
        "source": str(Path(source).name),
        "model_type": config.model_type,
        "architectures": config.architectures,
        "sparse_attention": config.sparse_attention,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "grown": grown,
        "note": "rotary positions have no table; only the limit was raised" if rotary else None,
        "versions": {"sparse_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
