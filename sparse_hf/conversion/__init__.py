"""`convert`: a dense checkpoint becomes a folder that loads as its sparse counterpart."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.utils import logging

from ..models.hf.layer_spec import LayersLike
from ..pattern.like import PatternLike
from .carry import carry, has_tokenizer
from .folder import check_target, keep_apart, whole_folder
from .generation import write_cache
from .gguf import dequantise, is_gguf, read_gguf
from .hub import Place
from .indexers import write_new
from .prepare import REPORT, Choice, Prepared, prepare
from .processors import declare_classes, set_limit
from .progress import progress_bar
from .push import push_to_hub
from .report import describe, report_text
from .shards import read_shard
from .source import Source, find_source, open_source
from .weights import Work, write_weights

__all__ = ["convert", "describe_conversion", "push_to_hub", "report_text"]

logger = logging.get_logger(__name__)

REPORT_TEXT = "conversion.txt"


def convert(
    source: str | Path,
    out: str | Path,
    pattern: PatternLike | None = None,
    *,
    layers: LayersLike = None,
    max_length: int | None = None,
    positions: str = "tile",
    rope: str | None = None,
    global_token_ids: Sequence[int | str] = (),
    cache: str | None = None,
    decode: str | None = None,
    indexer: Mapping[str, int] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
) -> Path:
    """Write the sparse counterpart of a dense checkpoint.

    Weights keep their names and are copied piece by piece; the model is never built (but for GGUF, which Transformers
    dequantises). The folder is written under another name and renamed when it is whole. What was done is told in its
    `conversion.json` and `conversion.txt`.

    Args:
        source: a folder, a `.gguf` file, or a hub id ("owner/name", or "name" as in "gpt2").
        out: the folder to write.
        pattern: a `Pattern` or its text; families that are sparse by themselves (Longformer, LED, BigBird) need none.
        layers: which layers get another pattern, see `sparse_hf.parse_layers`.
        max_length: positions of the result, in tokens; by default as many as before.
        positions: how learned tables of positions grow, by tiled copy ("tile") or along straight lines ("interpolate").
        rope: how rotary angles are scaled to a greater `max_length`, "yarn" or "linear"; by default not at all.
        global_token_ids: tokens that `marked()` speaks of wherever they occur, ids or texts like "[CLS]".
        cache: the `cache_implementation` with which `generate` decodes, written to `generation_config.json`: "streaming" (bounded
            memory), "dynamic", "static" or another of Transformers'. By default "streaming" where every layer's pattern lets it,
            else what the dense folder says.
        decode: "dense" has `generate` read a prompt by the pattern, and decode behind it as the dense model does, with all keys kept.
        indexer: "heads" and "width" of what `topk(..., 'indexer')` scores keys by, by default 8 heads of 64; with "share" so
            many neighbours of the layers that have such a pattern go by the indexer of the first of them. Its weights are new, and random
            until `sparse_hf.train.train_indexer` trains them, unless the source has some of this size.
        overwrite: replace `out` if it holds a checkpoint.
        progress: show a progress bar.
        revision: of a hub id, the branch, tag or commit; by default the main branch.
        subfolder: the folder of the checkpoint in the source.
        token: what gives access to a private or gated repository; by default the one that `hf auth login` stored.

    Returns:
        The folder; `AutoModel.from_pretrained` gives the sparse class after `import sparse_hf`.

    Raises:
        FileNotFoundError, FileExistsError: what to read is missing, what to write is there.
        ValueError: an unsupported family, a bad pattern or layer list, a damaged checkpoint, or `out` around `source`.
        OSError: the disk is full.

    Examples:
        >>> convert("my-bert", "long-bert", "window(128, 128) | first(1)", max_length=4096, progress=False).name
        'long-bert'
    """
    choice = Choice(pattern, layers, max_length, positions, rope, tuple(global_token_ids), cache, decode, indexer)
    place = Place(revision, subfolder, token)
    # the danger that matters most is told of first; a hub id is no path yet
    keep_apart(Path(source), Path(out))
    target = check_target(out, overwrite)
    if is_gguf(source):
        _convert_gguf(_gguf(source, place), target, choice, progress)
        return Path(out)
    found = find_source(source, place)
    keep_apart(found.folder, target)
    _write(prepare(found, choice), target, progress)
    return Path(out)


def describe_conversion(
    source: str | Path,
    pattern: PatternLike | None = None,
    *,
    layers: LayersLike = None,
    max_length: int | None = None,
    positions: str = "tile",
    rope: str | None = None,
    global_token_ids: Sequence[int | str] = (),
    cache: str | None = None,
    decode: str | None = None,
    indexer: Mapping[str, int] | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
) -> dict:
    """What `convert` would write into `conversion.json`, after the same checks; only headers are read.

    Arguments and errors are those of `convert`. A hub id is downloaded; of a GGUF file no tensors are listed, since
    Transformers names them while it dequantises.

    Examples:
        >>> describe_conversion("my-bert", "window(128, 128) | first(1)", max_length=4096)["max_length"]
        [512, 4096]
    """
    choice = Choice(pattern, layers, max_length, positions, rope, tuple(global_token_ids), cache, decode, indexer)
    place = Place(revision, subfolder, token)
    found = read_gguf(_gguf(source, place)) if is_gguf(source) else find_source(source, place)
    return describe(prepare(found, choice))


def _gguf(source: str | Path, place: Place) -> Path:
    if place.revision is not None or place.subfolder:
        raise ValueError(f"revision and subfolder are for folders and hub ids, and {source} is a file; leave them out")
    return Path(source)


def _write(prepared: Prepared, target: Path, progress: bool) -> None:
    report = describe(prepared)
    if not prepared.indexers:
        _write_folder(prepared, prepared.work, report, target, progress)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "indexers.safetensors"
        write_new(prepared.indexers, _dtype(prepared.source), file)
        _write_folder(prepared, prepared.work.with_shard(read_shard(file)), report, target, progress)


def _dtype(source: Source) -> str:
    """That of most tensors of a checkpoint, if it holds numbers that are trained."""
    most = Counter(tensor.dtype for tensor in source.tensors).most_common(1)
    return most[0][0] if most and most[0][0] in ("F64", "F32", "F16", "BF16") else "F32"


def _write_folder(prepared: Prepared, work: Work, report: dict, target: Path, progress: bool) -> None:
    source = prepared.source
    for warning in prepared.warnings:
        logger.warning("%s: %s", source.name, warning)
    extra = sum(path.stat().st_size for path in prepared.carried) + (16 << 20)
    with (
        whole_folder(target, work.bytes + extra) as folder,
        progress_bar(work.source_bytes, f"converting {source.name}", progress) as advance,
    ):
        write_weights(work, folder, advance)
        carry(prepared.carried, source.folder, folder)
        declare_classes(folder, prepared.tokenizer, prepared.family.dense_type)
        if prepared.limit is not None:
            set_limit(folder, prepared.limit, has_tokenizer(prepared.carried, source.folder))
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / REPORT_TEXT).write_text(report_text(report), encoding="utf-8")
        write_cache(folder, prepared.config, prepared.cache)
        # last, so that a folder without it never loads
        prepared.config.save_pretrained(folder)


def _convert_gguf(file: Path, target: Path, choice: Choice, progress: bool) -> None:
    # what the header says is checked before the minutes of dequantising
    source = read_gguf(file)
    prepare(source, choice)
    with (
        whole_folder(target, 8 * file.stat().st_size) as folder,
        tempfile.TemporaryDirectory(dir=folder) as dense,
    ):
        logger.warning("dequantising %s to float32, which takes a minute or so", file.name)
        dequantise(source, Path(dense))
        _write(prepare(open_source(Path(dense), file.name), choice), folder / "sparse", progress)
        for written in (folder / "sparse").iterdir():
            shutil.move(written, folder / written.name)
        (folder / "sparse").rmdir()
