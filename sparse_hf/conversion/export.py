"""`export`: a sparse checkpoint becomes one of Transformers' own, dense or with the sliding windows that it knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ..models.hf.config import SparseConfigMixin, dense_values
from ..models.hf.hearing import is_causal
from ..models.hf.register import FAMILIES, Family, family_of
from ..pattern import First, Pattern, Stride, Window
from ..pattern.base import Intersection, Union
from ..pattern.like import PatternLike
from .carry import carry
from .check import check_fits, meta_model, sees_past_only, sparse_config
from .dropping import COUNTED, measured_cost, share_of_pairs, without
from .folder import check_target, keep_apart, whole_folder
from .generation import forget_streaming
from .hub import Place
from .indexers import of_indexers
from .processors import declare_classes, tokenizer_class
from .progress import progress_bar
from .shards import Shard
from .source import Source, find_source
from .weights import Work, write_weights
from .windows import BIASES, BY_LAYER, FULL, SLIDING, TYPED, UNIFORM, mistral_values, size_values

logger = logging.get_logger(__name__)

FORMS = ("dense", "native")
EVERYTHING, PAST = Window(None, None), Window(None, 0)
INSTEAD = "export with to='dense' (--to dense), which drops the patterns, or keep the sparse checkpoint"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose pattern is a window, which may hold all that the layer could see."""

    stack: str
    number: int
    pattern: Pattern
    window: Window
    is_full: bool

    @property
    def name(self) -> str:
        return _name(self.stack, self.number)

    @property
    def reach(self) -> int:
        """How far back the window goes, of one that is not full."""
        assert self.window.left is not None, self
        return self.window.left


def export(
    folder: str | Path,
    out: str | Path,
    to: str,
    *,
    drop: PatternLike | None = None,
    text: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
) -> Path:
    """Write a sparse checkpoint as one that plain Transformers loads, without this package.

    Weights are copied as they are, without those of indexers. "dense" gives the family back with full attention, but for the
    windows over which it slid before its conversion; its answers are those of the sparse model only where the patterns were full. "native"
    gives the same answers, where Transformers can say the patterns: one sliding window, on layers that can have it. What
    else a pattern holds may be dropped by name; a warning says how many pairs that takes, and what it costs on a text.

    Args:
        folder: a checkpoint that `convert` or a sparse model's `save_pretrained` wrote, or a hub id.
        out: the folder to write.
        to: "dense" or "native".
        drop: a part of patterns that "native" leaves out, like "first(4)" of "window(511, 0) | first(4)".
        text: a file whose first 2,048 tokens the checkpoint reads before and after, where something is dropped.
        overwrite: replace `out` if it holds a checkpoint.
        progress: show a progress bar.
        revision, subfolder, token: where on the hub it is, as in `convert`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, FileExistsError: what to read is missing, what to write is there.
        ValueError: the checkpoint is not sparse, or a layer's pattern has no native form.
        OSError: the disk is full.

    Examples:
        >>> from sparse_hf import convert
        >>> sparse = convert("my-llama", "sparse", "window(63, 0)", progress=False)
        >>> export(sparse, "mistral", "native", progress=False).name
        'mistral'
    """
    if to not in FORMS:
        raise ValueError(f"to is {to!r}; it must be {' or '.join(map(repr, FORMS))}")
    if drop is not None and to != "native":
        raise ValueError(f"drop is {drop}, and to is {to!r}, which drops all patterns; leave drop out")
    if text is not None and drop is None:
        raise ValueError(
            f"text is {text}, on which dropping is measured, and nothing is dropped; give drop, or leave text out"
        )
    keep_apart(Path(folder), Path(out))
    target = check_target(out, overwrite)
    source = find_source(folder, Place(revision, subfolder, token))
    keep_apart(source.folder, target)
    family = family_of(source.config["model_type"])
    if source.config["model_type"] != family.sparse_type:
        raise ValueError(f"{folder} is {source.config['model_type']}, which is dense already; give a sparse checkpoint")
    values = dense_values(source.config)
    values["architectures"] = _stock_names(source, family)
    if to == "native":
        family, values = _native(source, family, values, None if drop is None else Pattern.parse(str(drop)))
    _write(source, family, values, target, is_native=to == "native", progress=progress)
    if text is not None:
        logger.warning("%s", measured_cost(source.folder, target, Path(text)))
    return Path(out)


def _stock_names(source: Source, family: Family) -> list[str]:
    stock = {sparse: dense for dense, sparse in family.architectures.items()}
    named = source.config.get("architectures") or [type(meta_model(family, source.config)).__name__]
    return [stock.get(name, name) for name in named]


def _write(source: Source, family: Family, values: dict, target: Path, *, is_native: bool, progress: bool) -> None:
    config = family.dense_config_class(**values)
    slides_over_one = is_native and getattr(config, "sliding_window", None) == 1
    shards = source.shards
    model, old = meta_model(family, values), meta_model(family_of(source.config["model_type"]), source.config)
    if model.base_model_prefix != old.base_model_prefix:
        shards = tuple(_renamed(shard, f"{old.base_model_prefix}.", f"{model.base_model_prefix}.") for shard in shards)
    if not source.config.get("quantization_config"):
        computed = family.positions.tables if family.positions.scheme == "sinusoidal" else ()
        check_fits((tensor for shard in shards for tensor in shard.tensors), model, computed, source.folder)
    left_out = frozenset(of_indexers((tensor for shard in shards for tensor in shard.tensors), family.config_class))
    if left_out:
        logger.warning("%d tensors of indexers are left out, of which Transformers knows nothing", len(left_out))
    work, carried = Work(shards, {}, left_out), source.carried
    tokenizer = tokenizer_class(source.folder, source.name, carried)
    extra = sum(path.stat().st_size for path in carried) + (1 << 20)
    with (
        whole_folder(target, work.bytes + extra) as folder,
        progress_bar(work.source_bytes, f"exporting {source.name}", progress) as advance,
    ):
        write_weights(work, folder, advance)
        carry(carried, source.folder, folder)
        declare_classes(folder, tokenizer, family.dense_type)
        forget_streaming(folder)
        if slides_over_one and model.can_generate():
            _keep_one_key(config, folder)
        # last, so that a folder without it never loads
        config.save_pretrained(folder)


def _keep_one_key(config: PreTrainedConfig, folder: Path) -> None:
    """Have `generate` take a static cache: Transformers' growing one keeps all keys where it should keep none of the past."""
    named = (folder / GENERATION_CONFIG_NAME).is_file()
    generation = GenerationConfig.from_pretrained(folder) if named else GenerationConfig.from_model_config(config)
    generation.cache_implementation = "static"
    generation.save_pretrained(folder)
    logger.warning(
        "a sliding_window of 1, as of window(0, 0), is decoded wrongly with Transformers' DynamicCache(config=...), so %s has "
        "generate take a static cache; in a loop of your own pass a StaticCache, or DynamicCache() without the configuration",
        GENERATION_CONFIG_NAME,
    )


def _renamed(shard: Shard, old: str, new: str) -> Shard:
    """The same bytes under other names: a head of Llama's calls its model otherwise than Mistral's does."""
    tensors = tuple(
        dataclasses.replace(t, name=new + t.name.removeprefix(old)) if t.name.startswith(old) else t
        for t in shard.tensors
    )
    return dataclasses.replace(shard, tensors=tensors, ready=False)


def _native(source: Source, family: Family, values: dict, drop: Pattern | None) -> tuple[Family, dict]:
    """The family and the configuration that say in Transformers' own words what the patterns say."""
    config = sparse_config(family, source.config)
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"use_bidirectional_attention is set, and its windows have no native form here; {INSTEAD}")
    causal_model = is_causal(meta_model(family, source.config))
    if drop is not None:
        _say_what_is_dropped(config, drop, causal_model)
    layers = list(_layers(config, causal_model, drop))
    if family.dense_type == "llama" and not all(layer.is_full for layer in layers):
        family, values = _as_mistral(config, values["architectures"])
    values = {**values, **_own_words(family, config, layers)}
    # what the family makes of it must be what was asked for
    made = sparse_config(family, values)
    for layer in layers:
        assert made.own_window(layer.number) == (None if layer.is_full else layer.window), layer
    return family, values


def _say_what_is_dropped(config: SparseConfigMixin, drop: Pattern, causal_model: bool) -> None:
    """Warn of each kind of layer that loses something.

    Raises:
        ValueError: none does.
    """
    kinds: dict[tuple[Pattern, Window], list[str]] = {}
    for stack, number, pattern, limit in _patterns(config, causal_model):
        if without(pattern, drop) != pattern:
            kinds.setdefault((pattern, limit), []).append(_name(stack, number))
    if not kinds:
        found = ", ".join(dict.fromkeys(str(pattern) for _, _, pattern, _ in _patterns(config, causal_model)))
        raise ValueError(f"drop is {drop}, which is a part of no layer's pattern; layers have {found}")
    count = sum(config.stacks.values())
    for (pattern, limit), names in kinds.items():
        share = 100 * share_of_pairs(pattern & limit, without(pattern, drop) & limit)
        logger.warning(
            "%s of %s is dropped in %d of %d layers, %.2g %% of their pairs at %s tokens; answers differ where they matter",
            drop, pattern, len(names), count, share, f"{COUNTED:,}",
        )  # fmt: skip


def _patterns(config: SparseConfigMixin, causal_model: bool) -> Iterator[tuple[str, int, Pattern, Window]]:
    """Each layer's stack, number and pattern, and the window of what it could see at all."""
    for stack, count in config.stacks.items():
        limit = PAST if sees_past_only(stack, causal_model) else EVERYTHING
        for number in range(count):
            yield stack, number, Pattern.parse(config.layer_pattern(number, stack=stack)), limit


def _layers(config: SparseConfigMixin, causal_model: bool, drop: Pattern | None) -> Iterator[Layer]:
    for stack, number, whole, limit in _patterns(config, causal_model):
        pattern = without(whole, drop)
        window = _window(pattern, limit)
        if window is None:
            part = _culprit(pattern, limit)
            inside = "" if part == pattern else f" in {pattern}"
            raise ValueError(
                f"{_name(stack, number)}: {part}{inside} has no native form: it is no sliding window; "
                f"{_how_to_drop(pattern, part)}{INSTEAD}"
            )
        yield Layer(stack, number, pattern, window, window == limit)


def _how_to_drop(pattern: Pattern, part: Pattern) -> str:
    return f"leave it out with drop={str(part)!r} (--drop {str(part)!r}), " if without(pattern, part) != pattern else ""


def _name(stack: str, number: int) -> str:
    return f"{stack} layer {number}".strip()


def _window(pattern: Pattern, limit: Window) -> Window | None:
    """The window that holds the same pairs as the pattern within `limit`, or None if none does."""
    if pattern.heads:
        found = {_window(head, limit) for head in pattern.heads}
        return found.pop() if len(found) == 1 else None
    # a subclass may hold other pairs
    if type(pattern) is Window:
        return pattern.narrowed(limit)
    if pattern == Stride(1):
        return limit
    if isinstance(pattern, Intersection):
        # windows first: what is left may be full inside them
        windows = [part for part in pattern.parts if isinstance(part, Window)]
        left: Window | None = limit
        for part in (*windows, *(part for part in pattern.parts if part not in windows)):
            left = None if left is None else _window(part, left)
        return left
    if isinstance(pattern, Union):
        found = [_window(part, limit) for part in pattern.parts if part != First(0)]
        if limit in found:
            return limit
        known = [window for window in found if window is not None]
        return reduce(Window.widened, known) if known and len(known) == len(found) else None
    return None


def _culprit(pattern: Pattern, limit: Window) -> Pattern:
    """The smallest part of a pattern without a window that has none either."""
    parts = pattern.heads or getattr(pattern, "parts", ())
    return next((_culprit(part, limit) for part in parts if _window(part, limit) is None), pattern)


def _as_mistral(config: SparseConfigMixin, architectures: list[str]) -> tuple[Family, dict]:
    """Llama with a window on every layer is Mistral, but for biases: the code is the same."""
    for field in BIASES:
        if getattr(config, field):
            raise ValueError(
                f"{field} is set, and Mistral, the native form of Llama with a window, has none; {INSTEAD}"
            )
    mistral = FAMILIES["mistral"]
    # all values, because the two families have other ones where a file says nothing
    values = mistral_values(dense_values(config.to_dict()))
    names = [name.replace("Llama", "Mistral") for name in architectures]
    unknown = [name for name in names if name not in mistral.architectures]
    if unknown:
        raise ValueError(f"architectures names {architectures}, and Mistral has no {unknown[0]}; {INSTEAD}")
    return mistral, {**values, "architectures": names}


def _own_words(family: Family, config: SparseConfigMixin, layers: list[Layer]) -> dict:
    """The fields that give every layer its window.

    Raises:
        ValueError: a layer that the family cannot have.
    """
    name = family.dense_type
    if name in TYPED:
        return _typed(name, config, layers)
    if name in BY_LAYER:
        size = _one_size(name, [layer for layer in layers if not layer.is_full])
        return size_values(config, size, [FULL if layer.is_full else SLIDING for layer in layers])
    if name in UNIFORM:
        return size_values(config, _one_size(name, layers), None)
    for layer in layers:
        if not layer.is_full:
            raise _refusal(layer, f"{name} has no sliding windows")
    return {}


def _one_size(name: str, layers: list[Layer]) -> int | None:
    """`sliding_window` of layers that must share it: it counts the query itself, so it is one more than the distance."""
    for layer in layers:
        if layer.window != layers[0].window:
            kind = "one window on all layers" if name in UNIFORM else "windows of one size only"
            raise _refusal(layer, f"{name} has {kind}, and {layers[0].name} has {layers[0].pattern}")
        if not layer.is_full and layer.window.right != 0:
            raise _refusal(layer, f"{name} slides over the past only")
    return None if not layers or layers[0].is_full else layers[0].reach + 1


def _typed(name: str, config: SparseConfigMixin, layers: list[Layer]) -> dict:
    for layer, kind in zip(layers, config.layer_types, strict=True):
        if layer.is_full != (kind == FULL):
            raise _refusal(layer, f"it is a {kind} layer of {name}, whose positions only such a layer can have")
    sliding = [layer for layer in layers if not layer.is_full]
    if not sliding:
        return {}
    if name != "modernbert":
        return {"sliding_window": _one_size(name, sliding)}
    for layer in sliding:
        window = layer.window
        if window.left != window.right:
            raise _refusal(layer, f"{name} slides as far to the left as to the right")
        if window != sliding[0].window:
            raise _refusal(
                layer, f"{name} has windows of one size only, and {sliding[0].name} has {sliding[0].pattern}"
            )
    # the whole width without the query itself
    return {"local_attention": 2 * sliding[0].reach}


def _refusal(layer: Layer, why: str) -> ValueError:
    return ValueError(f"{layer.name}: {layer.pattern} has no native form: {why}; {INSTEAD}")
