"""`MaskRequest`: what a model asked its mask function for, once for all layers of a forward pass.

Legend: B batch, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attention.operator import has_no_content
from ...attention.written_out import in_onnx_export
from ...pattern import full
from ...plan import BatchInfo, of_batch
from .config import SparseConfigMixin, past
from .documents import documents_of_bounds, number_documents
from .inner_padding import PaddingFirst, has_inner_padding, without_inner_padding
from .mask_functions import as_allowed, explicit_mask, packed_documents, read_mask_function, slides
from .streaming_cache import StreamingCache


def why_dense(config: Any) -> str:
    """The message for a dense model that was given one of our names for its attention."""
    return (
        f"{type(config).__name__.removesuffix('Config')} is a dense model without a pattern, so that attn_implementation="
        f"{config._attn_implementation!r} does not know what its layers see: make it sparse with "
        "sparse_hf.sparsify(model, 'window(255, 0) | first(4)'), or convert its folder with `sparse-hf convert`"
    )


@dataclass(frozen=True)
class StackFacts:
    """What the layers of a stack share.

    Args:
        name: of the stack.
        heads: query heads of a layer.
        patterns: of each layer, before it is cut to the past.
        counts_padding: does padding inside a row count as tokens? It does in families that are sparse by themselves, whose
            published classes count blocks by index.
    """

    name: str
    heads: int
    patterns: list[str]
    counts_padding: bool


@dataclass(frozen=True, eq=False)
class TokenData:
    """What a forward pass says of its tokens beside the mask.

    Args:
        positions: `[B or 1, Q]`, from which packed documents are read.
        bounds: `cu_seq_lens` of the keys: where documents begin in a single row, and the end of the last.
        marks: `[B, K]` or of fewer keys, the `global_attention_mask`.
        padding_is_outer: has somebody seen already that no padding stands between tokens of a text?
    """

    positions: Tensor | None = None
    bounds: Tensor | None = None
    marks: Tensor | None = None
    padding_is_outer: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.positions, self.bounds, self.marks


EVERYTHING = str(full())
# arguments of a pass that layers read, beside what Transformers hands them
NOTHING_SAID: Mapping[str, Any] = {}
# among them: a function that tells whether layers will be computed again when nobody says this any more
FLEETING = "is_fleeting"
# of the pass that goes on: the configuration of its model, and what was said
_OF_PASS: ContextVar[tuple[Any, Mapping[str, Any]] | None] = ContextVar("of_pass", default=None)


@contextmanager
def said_in_pass(config: Any, said: Mapping[str, Any]) -> Iterator[None]:
    """Have the mask requests of a model know arguments of its pass; some dense classes keep them from their layers.

    Args:
        config: the model's own, and that of the models within it, which may not be given what their head was.
    """
    before = _OF_PASS.set((config, {**said_of(config), **said}))
    try:
        yield
    finally:
        _OF_PASS.reset(before)


def said_of(config: Any) -> Mapping[str, Any]:
    """What was said in the pass of a model with this configuration."""
    found = None if torch.compiler.is_compiling() else _OF_PASS.get()
    return NOTHING_SAID if found is None or found[0] is not config else found[1]


@dataclass(frozen=True, eq=False)
class Batch:
    """Padding, documents and marks in the form that plans want.

    `padding_first` is there where padding inside a row would shift positions.
    """

    info: BatchInfo
    padding_first: PaddingFirst | None = None


@dataclass(eq=False)
class MaskRequest:
    """What the model asked its mask function for, and what its layers share, in `memo`; what they hand on to later ones, by their
    numbers, is in `handed_on`, on whatever device those are."""

    attention_mask: Tensor | None  # [B, K] bool, true on real tokens
    mask_function: Callable | None
    q_offset: int | Tensor
    # with a mask of pairs, positions say nothing of documents
    reads_documents: bool = True
    # names of mask functions whose pairs the patterns of the model hold already
    own: frozenset[str] = frozenset()
    # arguments of the pass, which some dense classes keep from their layers
    said: Mapping[str, Any] = field(default_factory=dict)
    memo: dict = field(default_factory=dict)
    # rows and keys; where a model around a text makes the request, the text's own class asks for them
    shape: tuple[int, int] = (0, 0)
    handed_on: dict[int, Any] = field(default_factory=dict)

    # dense classes ask masks for it; 4 would be a mask of pairs
    ndim = 2

    @classmethod
    def of(cls, given: MaskRequest | Tensor | None, query: Tensor, key: Tensor, config: Any = None) -> MaskRequest:
        """The request behind what a layer gets for its mask; a tensor is one of pairs, `[B or 1, 1, Q, K]`.

        Args:
            config: of the layer, which tells of which pass it is part.
        """
        if isinstance(given, MaskRequest):
            return given
        queries, keys, said = query.shape[2], key.shape[2], said_of(config)
        if given is None:
            return cls(None, None, keys - queries, said=said)
        if given.ndim == 4 and given.shape[1:3] == (1, 1) and queries > 1:
            # the same for every query: padding, as older classes write it
            return cls(as_allowed(given, 1, keys)[:, 0, 0], None, keys - queries, said=said)
        allowed = as_allowed(given, queries, keys)
        return cls(None, partial(explicit_mask, allowed, keys - queries), keys - queries, False, said=said)

    def first_real(self, device: torch.device) -> Tensor:
        """The slot of each row's first real token, `[B or 1]`."""
        real = self.attention_mask
        return torch.zeros(1, dtype=torch.long, device=device) if real is None else real.to(device).int().argmax(1)

    def real_tokens(self, rows: int, end: int, device: torch.device) -> Tensor:
        """Which of the first `end` slots hold real tokens, `[B, end]`."""
        real = self.attention_mask
        return torch.ones(rows, end, dtype=torch.bool, device=device) if real is None else real[:, :end].to(device)

    def to(self, target: Any = None, device: Any = None, dtype: torch.dtype | None = None) -> MaskRequest:
        """The request on another device. Of another dtype, which dense classes want of masks, it is what it is."""
        target = device if target is None else target
        if target is None or isinstance(target, torch.dtype):
            return self
        mask = None if self.attention_mask is None else self.attention_mask.to(target)
        return replace(self, attention_mask=mask, memo={})

    def repeat(self, *sizes: int) -> Tensor:
        """Which keys are real, `[B, 1, 1, K]`, repeated: heads that pool an image read all of its patches by torch's own attention.

        Raises:
            NotImplementedError: a mask that says more than that, or nothing.
        """
        if self.attention_mask is None or self.reading(False) != (False, None):
            raise NotImplementedError("a mask of all pairs was to be repeated, which sparse attention never makes")
        return self.attention_mask[:, None, None].repeat(*sizes)

    def stack(self, module: Any) -> StackFacts:
        """The stack of an attention module. A configuration is slow to answer, so it is asked once a pass."""
        config, is_decoder = module.config, module.__dict__.get("is_decoder", False)
        own = id(config), is_decoder
        found = self.memo.get(own)
        if found is None:
            if not isinstance(config, SparseConfigMixin):
                raise ValueError(why_dense(config))
            name = _stack(module)
            found = StackFacts(name, config.heads_of(name), config.layer_patterns(name), config.implies_pattern)
            if not torch.compiler.is_compiling():
                self.memo[own] = found
        return found

    def reading(self, module_is_causal: bool) -> tuple[bool, Callable | None]:
        """Is the mask causal, and what of it must be evaluated pair by pair (None: nothing)?"""
        if torch.compiler.is_compiling():
            return read_mask_function(self.mask_function, module_is_causal, self.own)
        own = "reading", bool(module_is_causal)
        if own not in self.memo:
            self.memo[own] = read_mask_function(self.mask_function, module_is_causal, self.own)
        return self.memo[own]

    def of_held(self, cache: StreamingCache, layer: int, query: Tensor, key: Tensor) -> MaskRequest:
        """The request in numbers of the keys that a layer of a cache gave: those that are held in order, and the queries' own."""
        if torch.compiler.is_compiling():
            return self._of_held(cache, layer, query, key)
        # layers that keep the same share it, and with it their plan
        own = "held", cache.own_layers[layer].kept, key.shape[2], key.device
        if own not in self.memo:
            self.memo[own] = self._of_held(cache, layer, query, key)
        return self.memo[own]

    def _of_held(self, cache: StreamingCache, layer: int, query: Tensor, key: Tensor) -> MaskRequest:
        held, new = key.shape[2], query.shape[2]
        real = cache.real(layer, held, new, key.shape[0])
        return MaskRequest(real, self.mask_function, held - new, reads_documents=False, own=self.own)

    def batch(self, tokens: TokenData, query: Tensor, key: Tensor, shifts: bool) -> Batch:
        """Padding, documents and marks of a layer, made once for layers that hand over the same tensors."""
        if has_no_content(query):
            return self._batch_in_graph(tokens, query, key, shifts)
        own = tuple(map(id, tokens.tensors)), query.shape[2], key.shape[2], query.device
        if own not in self.memo:
            # the tensors are kept, so that no others get their numbers
            self.memo[own] = self._batch(tokens, query, key), tokens
        return self.memo[own][0]

    def _batch(self, tokens: TokenData, query: Tensor, key: Tensor) -> Batch:
        real, end = self.attention_mask, int(self.q_offset) + query.shape[2]
        # a mask of ones says nothing, and slots behind the last token are seen by nobody
        real = None if real is None or bool(real[:, :end].all()) else real
        documents = self._documents(tokens, query, key)
        documents = None if documents is None or not bool(documents.any()) else documents
        info = of_batch(real, documents, _marks(tokens.marks, query, key, end))
        if real is None or not bool(has_inner_padding(real, documents)):
            return Batch(info)
        cut = of_batch(*(None if t is None else t[:, :end] for t in info.tensors))
        return Batch(info, PaddingFirst.of(cut, query.shape[2]))

    def _batch_in_graph(self, tokens: TokenData, query: Tensor, key: Tensor, shifts: bool) -> Batch:
        """The same where nothing can be read off tensors: padding inside a row is refused when the graph runs."""
        real, documents = self.attention_mask, self._documents(tokens, query, key)
        if real is not None and shifts and not tokens.padding_is_outer and not in_onnx_export():
            real = self._checked(real, documents)
        return Batch(of_batch(real, documents, _marks(tokens.marks, query, key, None)))

    def _checked(self, real: Tensor, documents: Tensor | None) -> Tensor:
        """`real`, looked at once for layers that ask the same: each look waits for the device."""
        own = "checked", documents is None
        if own not in self.memo:
            self.memo[own] = without_inner_padding(real, documents)
        return self.memo[own]

    def _documents(self, tokens: TokenData, query: Tensor, key: Tensor) -> Tensor | None:
        """The numbers of packed documents `[B, K]`. Whole sequences only (no cache)."""
        (rows, _, keys, _), queries, device = key.shape, query.shape[2], key.device
        if tokens.bounds is not None:
            if rows != 1:
                raise ValueError(f"cu_seq_lens are those of one row, and this batch has {rows}; pass position_ids")
            return documents_of_bounds(tokens.bounds.to(device), keys)
        if queries != keys or not self.reads_documents:
            return None
        if self.attention_mask is None:
            found = packed_documents(self.mask_function, rows, keys, device)
            if found is not None:
                return found
        positions = tokens.positions
        if positions is None or positions.ndim != 2 or positions.shape[1] != keys:
            return None
        return number_documents(positions, self.attention_mask).expand(rows, -1)


class TensorLikeRequest(MaskRequest):
    """That of a family which chooses keys by content, whose classes take the mask for a tensor on its way to their indexer."""

    dtype = torch.bool

    def __getitem__(self, index: Any) -> TensorLikeRequest:
        """The same request: the mask of a head is that of all."""
        return self

    def is_floating_point(self) -> bool:
        return False

    def __and__(self, choice: Any) -> Any:
        """The choice, which was made among the pairs of the mask."""
        return choice


def padding_in(given: Any) -> Tensor | None:
    """Which tokens are real, `[B, K]`, of what a text gets for its mask.

    A model around it may hand it a request that it has made itself, or one for each kind of layer.
    """
    given = next(iter(given.values()), None) if isinstance(given, Mapping) else given
    return given.attention_mask if isinstance(given, MaskRequest) else given


def layer_pattern(module: Any, stack: StackFacts, is_causal: bool, opaque: Callable | None = None) -> str:
    """The text of a layer's pattern, cut to the past if the model is causal.

    Args:
        opaque: the mask function that is evaluated pair by pair. One that holds the family's own window, and lets tokens of an image
            see those behind them, has the last word on a layer whose pattern is that window and no more.
    """
    # layers that share their weights do not know which they are
    layer = module.__dict__.get("layer_idx") or 0
    if (
        opaque is not None
        and slides(opaque)
        and stack.patterns[layer] == module.config.implied_pattern(stack.name, layer)
    ):
        return EVERYTHING
    if layer >= len(stack.patterns):
        return module.config.layer_pattern(layer, is_causal, stack.name)
    return past(stack.patterns[layer]) if is_causal else stack.patterns[layer]


def _stack(module) -> str:
    """The stack that an attention module belongs to, as `config.stacks` names it."""
    return "" if "" in module.config.stacks else "decoder" if module.is_decoder else "encoder"


def _marks(given: Tensor | None, query: Tensor, key: Tensor, end: int | None) -> Tensor | None:
    """Marks `[B, K]` bool. Keys behind the `end` are slots of a cache that nobody has filled yet."""
    if given is None:
        return None
    # multiple choice gives [batch, choices, K]
    marks = given.reshape(-1, given.shape[-1])
    rows, keys = key.shape[0], key.shape[2]
    wanted = keys if end is None else end
    if marks.shape[1] < keys and (end is None or marks.shape[1] == end):
        marks = torch.nn.functional.pad(marks, (0, keys - marks.shape[1]))
    if marks.shape != (rows, keys):
        raise ValueError(
            f"global_attention_mask has shape {tuple(given.shape)}; it must cover all {wanted} keys of {rows} rows, those in the "
            "cache included"
        )
    return marks.to(device=key.device, dtype=torch.bool)
