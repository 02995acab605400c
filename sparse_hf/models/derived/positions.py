"""How a family knows where a token stands: found on tiny copies of its configuration, and not listed.

A table has a row more where the limit of the configuration is one more: that says which tensors grow, and by which field.
Which row the first token takes, and whether padding takes one, is seen when a text is read.

Legend: B batch, N tokens.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..hf.positions import Positions
from .tiny_config import LIMITS, POSITIONS, tiny_config
from .tiny_model import FAILURES, apart, quiet, tiny_with_inputs

# a limit that is no other size of a tiny model either
LONGER = POSITIONS + 8
PADDING = 3
# names of what computes positions
ROTARY = re.compile(r"rotary|rope", re.IGNORECASE)
SINUSOIDAL = re.compile(r"sinusoid|positional_?enc|positional_?emb|PositionEncoding", re.IGNORECASE)
RELATIVE = re.compile(r"relative|rel_pos|rel_bias|position_bias|distance_embedding", re.IGNORECASE)
ALIBI = re.compile(r"alibi", re.IGNORECASE)
# of models of which nothing could be seen
UNKNOWN = Positions("none", checked_by_model=True)


class FoundPositions:
    """The `positions` of a derived configuration: those of its class by default, those of its own fields where it has some."""

    def __init__(self, dense_class: type[PreTrainedModel], of_class: Positions):
        self.dense_class, self.of_class = dense_class, of_class

    def __get__(self, config: Any, owner: type) -> Positions:
        if config is None:
            return self.of_class
        return _of_choices(self, type(config).__bases__[1], _choices(config))


def _choices(config: Any) -> tuple[tuple[str, Any], ...]:
    """The fields of a configuration that choose, and are no sizes."""
    return tuple((k, v) for k, v in vars(config).items() if isinstance(v, (str, bool)) and not k.startswith("_"))


@lru_cache(maxsize=256)
def _of_choices(found: FoundPositions, dense_config: type[PreTrainedConfig], choices: tuple) -> Positions:
    with quiet():
        names = dense_config().to_dict()
    chosen = {k: v for k, v in choices if k in names and names[k] != v and k not in ("model_type", "dtype")}
    if not chosen:
        return found.of_class
    try:
        return find_positions(found.dense_class, dense_config(**chosen))
    except FAILURES:
        return found.of_class


def find_positions(dense_class: type[PreTrainedModel], config: PreTrainedConfig) -> Positions:
    """How a model knows where a token stands.

    Args:
        dense_class: a class of Transformers.
        config: its configuration, of any size.
    """
    with apart():
        try:
            model, inputs, _ = tiny_with_inputs(dense_class, config)
        except FAILURES:
            return UNKNOWN
        of_text = "input_ids" in inputs
        found = {limit: grown for limit in _limits(config) if (grown := _grown(dense_class, config, limit)) is not None}
        if not found:
            return _without_table(model, config, of_text)
        limit, (tables, buffers) = next(iter(found.items()))
        if not of_text or len(found) > 1:
            # tables of several lengths, or with rows for what is no token of a text
            return Positions("learned", tuple(tables), limit=limit, checked_by_model=True, grows=False)
        return _of_table(model, inputs, limit, tables, buffers)


def _limits(config: PreTrainedConfig) -> list[str]:
    """The fields that limit positions, `max_position_embeddings` first."""
    found = [name for name, value in vars(config).items() if LIMITS.fullmatch(name) and isinstance(value, int)]
    alias = {real: name for name, real in (config.attribute_map or {}).items()}
    named = [alias.get(name, name) for name in found]
    return sorted(named, key=lambda name: name != "max_position_embeddings")


def _grown(
    dense_class: type[PreTrainedModel], config: PreTrainedConfig, limit: str
) -> tuple[list[str], list[str]] | None:
    """The names of tables and of buffers that have a row more where the limit is one more; None where there is none."""
    try:
        with torch.device("meta"):
            shapes = [
                {k: v.shape for k, v in dense_class(tiny_config(config, changes={limit: rows})).state_dict().items()}
                for rows in (POSITIONS, LONGER)
            ]
    except FAILURES:
        return None
    more, (small, large) = LONGER - POSITIONS, shapes
    changed = [k for k in small if k in large and small[k] != large[k]]
    tables = [k for k in changed if len(small[k]) > 1 and large[k][0] - small[k][0] == more]
    buffers = [k for k in changed if large[k][-1] - small[k][-1] == more and k not in tables]
    return (tables, buffers) if tables else None


def _of_table(
    model: PreTrainedModel, inputs: dict[str, Any], limit: str, tables: list[str], buffers: list[str]
) -> Positions:
    """Positions in tables, of which one is watched while a text is read."""
    own = model.state_dict(keep_vars=True)
    rows = int(getattr(model.config, limit))
    more = {name: own[name].shape[0] - rows for name in tables}
    first, skips = _probe(model, inputs, own[tables[0]])
    computed = all(_is_computed(model, name) for name in tables)
    offset = more[tables[0]] or (first or 0)
    return Positions(
        "sinusoidal" if computed else "learned",
        tuple(dict.fromkeys(_ending(name) for name in tables)),
        tuple(dict.fromkeys(_ending(name) for name in buffers)),
        offset=offset,
        counted=not more[tables[0]] and bool(offset),
        limit=limit,
        skips_padding=skips,
        # where the first row is not the one that the shapes say, nobody knows which rows are positions
        grows=first == offset and len(set(more.values())) == 1,
    )


def _ending(name: str) -> str:
    """The end of a key that tells a table from other weights, whatever head is around it."""
    words = name.split(".")
    return ".".join(words[-3:] if words[-1] == "weight" and len(words) > 2 else words[-2:])


def _is_computed(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return bool(SINUSOIDAL.search(type(module).__name__)) and "Learned" not in type(module).__name__


class _Rows(TorchFunctionMode):
    """The rows of a table that a model reads."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table, self.read = table, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.embedding and args[1] is self.table:
            self.read.append(args[0])
        elif func in (torch.Tensor.index_select, torch.index_select) and args[0] is self.table:
            self.read.append(args[2] if len(args) > 2 else kwargs["index"])
        elif func is torch.Tensor.__getitem__ and args[0] is self.table:
            index = args[1][0] if isinstance(args[1], tuple) else args[1]
            if isinstance(index, slice):
                self.read.append(torch.arange(self.table.shape[0])[index])
            elif isinstance(index, Tensor):
                self.read.append(index)
        return func(*args, **kwargs)


def _probe(model: PreTrainedModel, inputs: dict[str, Any], table: Tensor) -> tuple[int | None, bool]:
    """The row of the first token, None if nobody reads the table by rows; and whether padding before it moves it on."""
    with _Rows(table) as rows:
        model(**inputs)
    if not rows.read:
        return None, False
    first = int(rows.read[0].min())
    ids = inputs["input_ids"].clone()
    pad = getattr(model.config, "pad_token_id", None)
    ids[:, :PADDING] = pad if isinstance(pad, int) else 0
    mask = torch.ones_like(ids)
    mask[:, :PADDING] = 0
    try:
        with _Rows(table) as padded:
            model(**{**inputs, "input_ids": ids, "attention_mask": mask})
    except FAILURES:
        return first, False
    read = padded.read[0]
    return first, read.ndim == 2 and read.shape[1] == ids.shape[1] and int(read[0, PADDING]) == first


def _without_table(model: PreTrainedModel, config: PreTrainedConfig, of_text: bool) -> Positions:
    """Positions that are computed, by the names of what computes them."""
    names = [type(m).__name__ for m in model.modules()] + [name for name, _ in model.named_modules()]
    fields = [name for name, value in vars(config).items() if value not in (None, False, 0) and "rope" in name.lower()]
    limit = next(iter(_limits(config)), "max_position_embeddings")
    held = [*names, *(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_buffers())]
    if any(ROTARY.search(name) for name in names) or fields:
        return Positions("rotary", limit=limit, checked_by_model=not of_text)
    if any(ALIBI.search(name) for name in held) or getattr(config, "alibi", False):
        return Positions("alibi", limit=limit)
    if any(RELATIVE.search(name) for name in held):
        return Positions("relative", limit=limit)
    if any(SINUSOIDAL.search(name) for name in held):
        return Positions("sinusoidal", limit=limit, checked_by_model=True)
    tables = [name for name, _ in model.named_parameters() if re.search(r"pos(ition)?_?(al)?_?emb", name)]
    if tables:
        # of the grid of an image, for one
        return Positions("learned", limit=limit, checked_by_model=True, grows=False)
    return Positions("none", limit=limit)
