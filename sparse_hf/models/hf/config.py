"""What a sparse model's `config.json` says: one key, `sparse_attention`.

{"patterns": {"sparse": "window(255, 0) | first(4)", "dense": "window(None, None)"},
 "layers": ["sparse", "sparse", "dense"],
 "global_token_ids": []}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ...pattern import LSH, Marked, Pattern, Window, full
from ...pattern.like import PatternLike
from ...pattern.past import past_of
from ..names import IMPLEMENTATIONS, Implementation
from .layer_spec import LayersLike, as_pattern, describe_layers, fit_names, name_of, named_layers
from .positions import Positions
from .remote_code import RemoteCode

logger = logging.get_logger(__name__)

# what stock names stand for on a sparse model: never silently dense
STOCK_NAMES: dict[str, Implementation] = {"eager": "sparse_reference", "sdpa": "sparse"}
KEYS = ("patterns", "layers", "global_token_ids", "decode", "indexer")
# of an indexer that a configuration says nothing of: heads, and the width of one
INDEXER = {"heads": 8, "width": 64}
# what tokens behind a prompt see in `generate`: what the pattern holds, or all that the dense model's would
DECODES = ("sparse", "dense")
# arguments of a sparse configuration that are written into `sparse_attention`
ARGUMENTS = ("pattern", "layers", "global_token_ids")
# keys of a configuration that are not the dense model's
NOT_DENSE = ("model_type", "architectures", "auto_map", "transformers_version", "sparse_attention")
# fields from which a pattern is made, and which change nothing once it is made
SOURCES_OF_PATTERNS = (
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "local_attention", "attention_window",
    "attention_type", "block_size", "num_random_blocks", "num_hashes", "hash_seed", "lsh_attn_chunk_length",
    "local_attn_chunk_length", "lsh_num_chunks_before", "lsh_num_chunks_after", "local_num_chunks_before",
    "local_num_chunks_after",
)  # fmt: skip
# what only the copy of a configuration for one layer has
OF_ONE_LAYER = "skip"
# kinds of layers of which Transformers' caches drop keys
SLIDING_KINDS = ("sliding_attention", "chunked_attention")
# the word of all patterns that speak of marked tokens
MARKED = Marked.word

# a mixin stands before a dense configuration, whose fields a type checker finds here
if TYPE_CHECKING:

    class _Config(PreTrainedConfig):
        num_hidden_layers: int = 0
        num_attention_heads: int = 0
else:
    _Config = object

# properties of the dense configuration that a sparse one sets in its own way
_DENSE_IMPLEMENTATION: Any = vars(PreTrainedConfig)["_attn_implementation"]
_DENSE_OUTPUT: Any = vars(PreTrainedConfig)["output_attentions"]

AnySparseConfig = TypeVar("AnySparseConfig", bound="SparseConfigMixin")


def dense_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a `config.json`, dense or sparse, describes the dense model."""
    return {key: value for key, value in config.items() if key not in NOT_DENSE}


def check_weights(implementation: str | None) -> None:
    """Raise ValueError unless `implementation` gives attention weights."""
    if implementation != "sparse_reference":
        raise ValueError(
            f"attention weights are n x n, which attn_implementation={implementation!r} never makes; to look at a short text "
            "use attn_implementation='sparse_reference'"
        )


def own_implementation(name: str | None) -> str:
    """The sparse implementation that `attn_implementation=name` stands for.

    Raises:
        ValueError: a name that would make the model dense (flash, flex_attention) or is unknown.
    """
    if name is None:
        return "sparse"
    if name in IMPLEMENTATIONS:
        return name
    if name in STOCK_NAMES:
        logger.warning_once(
            f"attn_implementation={name!r} on a sparse model means {STOCK_NAMES[name]!r}: its pattern still holds."
        )
        return STOCK_NAMES[name]
    raise ValueError(
        f"attn_implementation={name!r} would ignore the sparse pattern; the sparse ones are {', '.join(IMPLEMENTATIONS)}"
    )


@dataclass(kw_only=True)
class SparseConfigMixin(_Config):
    """Adds `sparse_attention` to a configuration of Transformers; without it every layer is as dense as the parent's.

    What `sparse_attention` says is all that makes attention sparse: a sliding window of the family's own is written into it
    when it is made, layer by layer, and not applied a second time. A layer's pattern goes by the layer's number, `layer_idx`.

    Args:
        pattern: a `Pattern` or its text, from which `sparse_attention` is made as `from_dense` makes it.
        layers: which layers get another pattern, see `from_dense`.
        global_token_ids: token ids that `marked()` speaks of wherever they occur.
        sparse_attention: in place of these three, what a `config.json` says.

    Examples:
        >>> from sparse_hf import SparseLlamaConfig
        >>> spec = {"patterns": {"near": "window(63, 0)", "far": "causal()"}, "layers": ["near", "far"]}
        >>> SparseLlamaConfig(num_hidden_layers=2, sparse_attention=spec).layer_pattern(0, True)
        'window(63, 0) & window(None, 0)'
    """

    sparse_attention: dict[str, Any] | None = None
    # is the family sparse by itself, so that its configuration implies a pattern?
    implies_pattern: ClassVar[bool] = False
    # do its layers choose keys by content, among those that a pattern holds?
    chooses_keys: ClassVar[bool] = False
    # has the family caches of its own, which drop keys that no layer sees again?
    own_caches: ClassVar[bool] = False
    # do heads mark tokens by themselves, so that it is the model inside that adds those named by id?
    heads_mark: ClassVar[bool] = False
    # do published models mark nothing, though the implied pattern has marked() for those who do?
    marks_are_optional: ClassVar[bool] = False
    # how the family knows where a token stands, and its classes by name: both written by `register_family`
    positions: ClassVar[Positions | None] = None
    remote_code: ClassVar[RemoteCode | None] = None
    # names of Transformers' mask functions whose pairs the patterns hold already, beside those that all families share
    own_mask_functions: ClassVar[frozenset[str]] = frozenset()
    # the message for marks that no pattern of the model asks for
    why_no_marks: ClassVar[str] = "no pattern of this model has marked(); add `| marked()`"

    def __post_init__(self, **kwargs):
        given = {name: kwargs.pop(name) for name in ARGUMENTS if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None and value != []}
        # fields that the parent settles change no pattern yet, see `__setattr__`
        spec, self.sparse_attention = self.sparse_attention, None
        kwargs.setdefault("attn_implementation", "sparse")
        super().__post_init__(**kwargs)
        if given and spec is not None:
            raise ValueError(f"sparse_attention and {' and '.join(given)} are given; one says all that the other does")
        self.sparse_attention = self.describe(**given) if given else spec
        self.validate_sparse_attention()

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self)
        # a copy for one layer, which Transformers makes where layers differ, is given what that layer has
        if name in SOURCES_OF_PATTERNS and own.get("sparse_attention") is not None and OF_ONE_LAYER not in own:
            before = getattr(self, name, None)
            if value != before:
                # what is set in vain is said each time
                logger.warning(
                    f"{type(self).__name__}.{name} was {before!r} when sparse_attention was made, which alone says what a layer "
                    f"sees: {name}={value!r} changes no pattern; make the configuration anew with "
                    f"{type(self).__name__}.from_dense(config, pattern)"
                )
        super().__setattr__(name, value)

    def _set_attn_implementation(self, value):
        # by whatever route it is set, a sparse configuration holds an implementation that honours its pattern
        value = value if isinstance(value, dict) else own_implementation(value)
        _DENSE_IMPLEMENTATION.fset(self, value)

    # Transformers annotates its own property as a field
    _attn_implementation = property(  # pyright: ignore[reportAssignmentType]
        _DENSE_IMPLEMENTATION.fget, _set_attn_implementation
    )

    def _set_output_attentions(self, value):
        if value:
            check_weights(self._attn_implementation)
        self._output_attentions = value

    output_attentions = property(_DENSE_OUTPUT.fget, _set_output_attentions)

    def validate_output_attentions(self):
        if self.output_attentions:
            check_weights(self._attn_implementation)

    @classmethod
    def is_custom_code(cls) -> bool:
        # kinds of layers are called as in the dense family, whose code reads them
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: `save_pretrained` names every class in `auto_map`, and no source file is copied."""

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As Transformers', with `auto_map` and the file that it speaks of, for `trust_remote_code=True`."""
        if self.remote_code is not None:
            self.auto_map = self.remote_code.auto_map(self.architectures)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.remote_code.write(save_directory)
        with self.saved_as():
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def get_text_config(self, decoder=None, encoder=None):
        """As Transformers'. Caches are made by that of a decoder, and none may drop keys by a window of the dense family."""
        found = super().get_text_config(decoder, encoder)
        types = getattr(found, "layer_types", None)
        slides = getattr(found, "sliding_window", None) is not None if types is None else "sliding_attention" in types
        # an encoder's configuration has no word on caches
        if not decoder or encoder or not slides or not hasattr(found, "use_cache"):
            return found
        view = object.__new__(_for_caches(type(found)))
        # libraries set values on what they get here, which must be those of the model's own
        view.__dict__ = found.__dict__
        return view

    @contextmanager
    def saved_as(self, numbers: Mapping[str, Sequence[int]] | None = None) -> Iterator[None]:
        """Have `sparse_attention` name a pattern for each layer that is saved, as long as saving takes.

        Args:
            numbers: of the layers of each stack, the numbers by which they find their pattern in memory, see `layer_numbers`.
        """
        spec = self.sparse_attention
        self.sparse_attention = self._fitted(numbers or {})
        try:
            yield
        finally:
            self.sparse_attention = spec

    def _fitted(self, numbers: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
        """`sparse_attention` for the layers that there are, where some were dropped or repeated since it was made."""
        if self.sparse_attention is None:
            return None
        layers = {
            stack: fit_names(names, self.stacks[stack], numbers.get(stack), stack)
            for stack, names in _by_stack(self.sparse_attention["layers"], self.stacks).items()
        }
        return {**self.sparse_attention, "layers": layers.get("", layers)}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As Transformers'; `pattern`, `layers` and `global_token_ids` among `kwargs` replace `sparse_attention`."""
        given = {name: kwargs.pop(name) for name in ARGUMENTS if name in kwargs}
        if given:
            config_dict = {key: value for key, value in config_dict.items() if key != "sparse_attention"} | given
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        # other fields among `kwargs` were set without a check, the number of layers for one
        config.sparse_attention = config._fitted({})
        config.validate_sparse_attention()
        return made

    @classmethod
    def from_dense(
        cls: type[AnySparseConfig],
        dense: PreTrainedConfig | Mapping[str, Any],
        pattern: PatternLike | None = None,
        layers: LayersLike = None,
        global_token_ids: Sequence[int] = (),
        decode: str | None = None,
        indexer: Mapping[str, int] | None = None,
    ) -> AnySparseConfig:
        """The counterpart of a configuration of Transformers.

        Args:
            dense: a configuration object, or the dict of a `config.json`.
            pattern: a `Pattern` or its text, for every layer that `layers` does not name. Layers that slide over a window in
                the dense family have it cut to that window. Families that are sparse by themselves need none: without it
                each layer keeps what its configuration implies.
            layers: see `parse_layers`; encoder-decoders say "encoder" or "decoder" before the range, as in
                `"encoder 0-3=dense, decoder=window(255, 0)"`. A layer that is named gets exactly what is said.
            global_token_ids: token ids that `marked()` speaks of wherever they occur.
            decode: "dense" has `generate` read a prompt by the pattern, and decode behind it as the dense model does.
            indexer: "heads" and "width" of what `topk(..., 'indexer')` scores keys by; by default 8 heads of 64. With "share" so
                many neighbours among the layers that have such a pattern go by one indexer, that of the first of them.

        Raises:
            ValueError: no pattern for a family that implies none, or one that does not fit the model.
        """
        given = dense if isinstance(dense, Mapping) else dense.to_dict()
        values = dense_values(given)
        if values.pop("output_attentions", None):
            logger.warning_once(
                "output_attentions of the dense configuration is left out: attention weights are n x n, and only "
                "attn_implementation='sparse_reference' makes them"
            )
        plain = cls(**values)
        spec = plain.describe(pattern, layers, global_token_ids)
        if indexer is not None or any(Pattern.parse(text).uses_indexer for text in spec["patterns"].values()):
            # one that is there keeps its size, and its weights
            own = (given.get("sparse_attention") or {}).get("indexer")
            spec["indexer"] = {**INDEXER, **(own or {}), **(indexer or {})}
        return cls(**values, sparse_attention=spec if decode is None else {**spec, "decode": decode})

    def describe(
        self, pattern: PatternLike | None = None, layers: LayersLike = None, global_token_ids: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What `sparse_attention` says for these arguments of `from_dense`."""
        if pattern is None and not self.implies_pattern:
            raise ValueError(f"{self.model_type} implies no pattern; give one, like 'window(255, 0) | first(4)'")
        wanted = None if pattern is None else as_pattern(pattern)
        named = named_layers(layers, self.stacks)
        every = [(stack, layer) for stack, count in self.stacks.items() for layer in range(count)]
        chosen = {layer: named[layer] if layer in named else self.pattern_of(*layer, wanted) for layer in every}
        return describe_layers(chosen, chosen[every[0]] if wanted is None else wanted, global_token_ids)

    @property
    def stacks(self) -> dict[str, int]:
        """Layers per stack: "" for most models, "encoder" and "decoder" for those that have both."""
        return {"": self.num_hidden_layers}

    def heads_of(self, stack: str) -> int:
        return self.num_attention_heads

    def own_window(self, layer: int) -> Pattern | None:
        """The window over which the dense family's layer slides, or None.

        `sliding_window` counts the query itself, so the farthest key is `sliding_window - 1` back.
        """
        size, types = getattr(self, "sliding_window", None), getattr(self, "layer_types", None)
        if size is None or (types is not None and types[layer] != "sliding_attention"):
            return None
        return Window(size - 1, 0)

    def implied_pattern(self, stack: str, layer: int) -> str:
        """What a layer attends to if `sparse_attention` says nothing: of a dense family everything within its own window."""
        window = self.own_window(layer)
        return str(full() if window is None else window)

    def pattern_of(self, stack: str, layer: int, pattern: Pattern | None) -> Pattern:
        """What becomes of `pattern` in a layer; None is the implied one."""
        return (
            as_pattern(self.implied_pattern(stack, layer)) if pattern is None else _cut(pattern, self.own_window(layer))
        )

    def validate_sparse_attention(self) -> None:
        """Raise ValueError with the remedy if `sparse_attention` does not fit this configuration."""
        spec = self.sparse_attention
        if spec is None:
            return
        if not isinstance(spec, dict) or set(spec) - set(KEYS) or not {"patterns", "layers"} <= set(spec):
            found = list(spec) if isinstance(spec, dict) else spec
            raise ValueError(
                f"sparse_attention holds {found}; it needs the keys 'patterns' and 'layers' and may have 'global_token_ids', "
                "'decode' and 'indexer'. A newer sparse_hf may have written it"
            )
        if not isinstance(spec["patterns"], dict):
            raise ValueError("sparse_attention.patterns must be an object (name -> pattern)")
        patterns = {name: Pattern.parse(text) for name, text in spec["patterns"].items()}
        for stack, names in _by_stack(spec["layers"], self.stacks).items():
            self._validate_stack(stack, names, patterns)
        self.sparse_attention = {**spec, "patterns": {name: str(pattern) for name, pattern in patterns.items()}}
        ids = spec.get("global_token_ids") or []
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"sparse_attention.global_token_ids is {ids}; it must be a list of token ids")
        self.check_decode(self.decode)
        self._validate_content(patterns.values())
        self._validate_indexer(patterns.values())
        if ids and not self.uses_marks:
            raise ValueError("sparse_attention.global_token_ids is set, but no pattern has marked(); add `| marked()`")

    def _validate_indexer(self, patterns: Iterable[Pattern]) -> None:
        said, asking = self.indexer, [pattern for pattern in patterns if pattern.uses_indexer]
        if not asking:
            if "indexer" in (self.sparse_attention or {}):
                raise ValueError(f"indexer is {said}, and no pattern has topk(..., 'indexer'), which would use it")
            return
        if set(self.stacks) != {""} or self.implies_pattern:
            raise ValueError(
                f"{asking[0]} gives layers an indexer, and {self.model_type} is no dense decoder of one stack; use topk(...) without it"
            )
        is_known = set(INDEXER) <= set(said) <= {*INDEXER, "share"}
        if not is_known or not all(type(value) is int and value > 0 for value in said.values()):
            raise ValueError(
                f"indexer is {said}; it needs {' and '.join(INDEXER)} and may have share, whole numbers from 1, like {INDEXER}"
            )

    def _validate_content(self, patterns: Iterable[Pattern]) -> None:
        if self.implies_pattern:
            return
        weighs = self.positions is not None and self.positions.weighs_distances
        caps = getattr(self, "attn_logit_softcapping", None) is not None
        for choosing in (pattern for pattern in patterns if pattern.uses_content):
            added = None
            if weighs:
                added = "adds a weight of the distance to these"
            elif caps and LSH.word in str(choosing):
                added = "caps these (attn_logit_softcapping)"
            if added is not None:
                raise ValueError(
                    f"{choosing} chooses pairs by products of queries and keys, and {self.model_type} {added}: give a pattern of "
                    "positions, like 'window(255, 0) | first(4)'"
                )

    def _validate_stack(self, stack: str, names: list, patterns: dict[str, Pattern]) -> None:
        where = f"sparse_attention.layers[{stack!r}]" if stack else "sparse_attention.layers"
        if len(names) != self.stacks[stack]:
            raise ValueError(f"{where} has {len(names)} entries; the model has {self.stacks[stack]} layers")
        unknown = sorted({str(name) for name in names} - set(patterns))
        if unknown:
            raise ValueError(f"{where} names {unknown}; the patterns are {sorted(patterns)}")
        for name in dict.fromkeys(names):
            check_heads(patterns[name], self.heads_of(stack), f"sparse_attention.patterns[{name!r}]")
            if stack == "decoder" and MARKED in str(patterns[name]):
                raise ValueError(
                    f"{where} uses {patterns[name]}, and marked() speaks of tokens of the encoder; give the decoder a pattern "
                    "of its own, like layers='decoder=window(255, 0)'"
                )

    def layer_pattern(self, layer: int | None, is_causal: bool = False, stack: str = "") -> str:
        """The text of a layer's pattern, cut to the past if the model is causal. Layer None: of a layer that all share."""
        layer = 0 if layer is None else layer
        spec = self.sparse_attention
        if spec is None:
            text = self.implied_pattern(stack, layer)
        else:
            names = spec["layers"][stack] if stack else spec["layers"]
            text = spec["patterns"][name_of(names, layer, stack)]
        return past(text) if is_causal else text

    def layer_patterns(self, stack: str = "") -> list[str]:
        """The text of the pattern of each layer of a stack, as of `layer_pattern` in a model that is not causal."""
        spec, count = self.sparse_attention, self.stacks[stack]
        if spec is None:
            return [self.implied_pattern(stack, layer) for layer in range(count)]
        names, patterns = (spec["layers"][stack] if stack else spec["layers"]), spec["patterns"]
        return [patterns[name_of(names, layer, stack)] for layer in range(count)]

    @property
    def global_token_ids(self) -> list[int]:
        return list((self.sparse_attention or {}).get("global_token_ids") or [])

    @property
    def decode(self) -> str:
        """What tokens behind a prompt see in `generate`: "sparse" or "dense"."""
        return (self.sparse_attention or {}).get("decode") or DECODES[0]

    @property
    def indexer(self) -> dict[str, int]:
        """Heads of the indexers that layers with `topk(..., 'indexer')` have, the width of a head, and how many layers share one."""
        return dict((self.sparse_attention or {}).get("indexer") or INDEXER)

    def check_decode(self, decode: str) -> None:
        """Raise ValueError if a model cannot decode so."""
        if decode not in DECODES:
            raise ValueError(f"decode is {decode!r}; it must be {' or '.join(map(repr, DECODES))}")
        if decode == "dense" and (self.implies_pattern or set(self.stacks) != {""}):
            raise ValueError(
                f"decode is 'dense', and {self.model_type} is no decoder with a dense counterpart; leave it out"
            )

    def dense_patterns(self) -> tuple[str, ...]:
        """What each layer of the dense decoder sees: all of the past, or its own window of it."""
        return tuple(past(self.implied_pattern("", layer)) for layer in range(self.num_hidden_layers))

    @property
    def uses_marks(self) -> bool:
        # validation wrote the patterns in their one text form
        spec = self.sparse_attention
        return self.implies_pattern if spec is None else any(MARKED in text for text in spec["patterns"].values())


def _by_stack(layers, stacks: Mapping[str, int]) -> dict[str, list]:
    named = {"": layers} if isinstance(layers, list) else layers
    if not isinstance(named, dict) or set(named) != set(stacks) or not all(isinstance(v, list) for v in named.values()):
        wanted = "a list of names" if "" in stacks else "an object with a list of names for 'encoder' and for 'decoder'"
        raise ValueError(f"sparse_attention.layers is {layers!r}; it must be {wanted}")
    return named


def _cut(pattern: Pattern, window: Pattern | None) -> Pattern:
    if window is None:
        return pattern
    if pattern == full():
        return window
    if pattern.heads:
        return type(pattern)(*(_cut(p, window) for p in pattern.heads))
    return pattern & window


@lru_cache
def _for_caches(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of views of a configuration's values to which no layer slides."""

    def layer_types(self) -> list[str]:
        # layers of another kind than attention keep states of their own
        kinds = self.__dict__.get("layer_types") or ["sliding_attention"] * self.num_hidden_layers
        return ["full_attention" if kind in SLIDING_KINDS else kind for kind in kinds]

    def set_types(self, kinds: list[str] | None) -> None:
        self.__dict__["layer_types"] = kinds

    # a view is saved, copied and pickled as what it shows
    members = {"layer_types": property(layer_types, set_types), "__reduce__": _shown, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _shown(view: PreTrainedConfig) -> tuple:
    return object.__new__, (type(view).__mro__[1],), view.__dict__


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def past(text: str) -> str:
    return _cached_past(text)


@lru_cache(maxsize=256)
def _cached_past(text: str) -> str:
    return str(past_of(Pattern.parse(text)))


def check_heads(pattern: Pattern, num_heads: int, where: str) -> None:
    """Raise ValueError if a pattern names another number of heads."""
    if pattern.heads and len(pattern.heads) != num_heads:
        raise ValueError(f"{where}: per_head names {len(pattern.heads)} patterns; the model has {num_heads} heads")
