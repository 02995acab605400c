"""Continuous batching: the new tokens of several requests in one row, and their keys in pages of one memory.

Transformers schedules requests, writes their keys to pages, and hands each layer the keys of all requests one behind the other.
Attention of a request is then a call of its own, whose queries are the last of its keys, so that its pattern counts from its own
first token.

Layers whose patterns have an end keep no more pages of a request than a window needs: Transformers has a ring of pages for layers that
slide, and ours is of the same size as one of its own, with the first tokens in place before it.

Legend: B batch, H query heads, G key heads, Q new tokens of all requests, K keys of all requests, D head dim.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...attention import attention
from ...attention.backend import AttentionCall
from ...attention.dropout import NO_DROPOUT
from ...attention.merge import with_sink
from ...attention.scoring import Scoring
from ...plan import NOTHING
from .kept import Kept, joined, read_kept

# the kinds of pages that Transformers knows: those that keep all tokens of a request, and a ring of the last ones
ALL_KEPT, RING = "full_attention", "sliding_attention"

# where the new tokens and the keys of a request stand: begin and end of both
Bounds = list[tuple[int, int, int, int]]


# methods of an allocator that say where tokens are, and what these ask of it
PLACES = ("get_seqlen_k", "get_read_indices", "get_write_indices")
ASKED = ("block_table", "tokens_per_page", "block_physical_stride", "sentinel_index", "write_trash_index")


@dataclass(frozen=True)
class RingOfPages:
    """Which slots of a request's pages hold which tokens, for layers that forget: the first ones in place, the last ones in turn.

    Its methods stand in for those of Transformers' allocator of a window, which it has as many slots as.

    Attributes:
        kept: what the patterns of all these layers need.
        allocator: Transformers', which hands out pages.
    """

    kept: Kept
    allocator: Any

    @staticmethod
    def slots(kept: Kept) -> int:
        """Slots of a request, the window of Transformers' words: a new token finds all that it sees, and overwrites none of it."""
        assert kept.left is not None
        return kept.sinks + kept.left + kept.period

    def stand_in(self) -> None:
        """Have the allocator go by these places.

        Raises:
            NotImplementedError: one of a version that calls them otherwise.
        """
        lost = [name for name in (*PLACES, *ASKED) if not hasattr(self.allocator, name)]
        if lost:
            raise NotImplementedError(
                f"the pages of this version of Transformers have no {', '.join(lost)}, and tokens would be looked for in wrong places; use "
                "generate, which takes padded batches"
            )
        for name in PLACES:
            setattr(self.allocator, name, getattr(self, name))

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        return past_length - self._dropped(past_length) + query_length

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Where the keys stand that new tokens see, in order; new ones have a number that says so."""
        sinks = min(past_length, self.kept.sinks)
        first = sinks + self._dropped(past_length)
        old = [*self._places(request_id, 0, sinks), *self._places(request_id, first, past_length)]
        return old + [self.allocator.sentinel_index] * query_length

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Where new tokens go; those that others of them would overwrite go nowhere."""
        sinks, end = self.kept.sinks, past_length + query_length
        begin_ring = max(past_length, sinks, end - (self.slots(self.kept) - sinks))
        of_sinks = self._places(request_id, past_length, min(end, sinks))
        of_ring = self._places(request_id, min(begin_ring, end), end)
        nowhere = query_length - len(of_sinks) - len(of_ring)
        return [*of_sinks, *[self.allocator.write_trash_index] * nowhere, *of_ring]

    def _dropped(self, past_length: int) -> int:
        """Tokens behind the first ones that nobody sees any more, out of so many."""
        assert self.kept.left is not None
        return max(0, past_length - self.kept.sinks - self.kept.left) // self.kept.period * self.kept.period

    def _places(self, request_id: str, begin: int, end: int) -> list[int]:
        """Places in memory of the tokens from `begin` to `end`, which are all among the first or all among the others."""
        table, size = self.allocator.block_table[request_id], self.allocator.tokens_per_page
        sinks, found = self.kept.sinks, []
        while begin < end:
            turn = self.slots(self.kept) - sinks
            slot = begin if begin < sinks else sinks + (begin - sinks) % turn
            # as far as a page goes, and not beyond the end of the ring
            run = min(end - begin, size - slot % size, self.slots(self.kept) - slot)
            place = table[slot // size] * self.allocator.block_physical_stride + slot % size
            found.extend(range(place, place + run))
            begin += run
        return found


def make_manager(model: Any, generation_config: Any, batching_config: Any, hints: Any) -> Any:
    """Transformers' manager of requests, which leaves a model its own attention.

    Raises:
        NotImplementedError: a version of Transformers, or a model, whose requests would be computed otherwise than alone.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    if "auto_switch_to_flash" not in inspect.signature(ContinuousBatchingManager.switch_to_cb_friendly_attn).parameters:
        raise NotImplementedError(
            "continuous batching of sparse models needs Transformers 5.24, whose pages attention of others may read; use generate, "
            "which takes padded batches"
        )
    _check(model)

    class SparseManager(ContinuousBatchingManager):
        def switch_to_cb_friendly_attn(self, model, auto_switch_to_flash=True):
            """Nothing to do: `paged_attention` reads what the pages hold."""

        def _create_batch_processor(self):
            with _kinds_of_pages(self.model.config):
                processor = super()._create_batch_processor()
            allocator = processor.cache.cache_allocators.get(RING)
            if allocator is not None:
                RingOfPages(joined(_forgetting(self.model.config).values()), allocator).stand_in()
            return processor

    given = model.generation_config if generation_config is None else generation_config
    if given.eos_token_id is None:
        # Transformers' word for none, which the caller's own configuration need not keep
        given = copy.copy(given)
        given.eos_token_id = -1
    # its older place
    batching = batching_config or getattr(given, "continuous_batching_config", None) or ContinuousBatchingConfig()
    if batching.use_cuda_graph:
        raise NotImplementedError(
            "use_cuda_graph=True: requests are told apart by the host, which a CUDA graph cannot record; leave it out"
        )
    batching.use_cuda_graph = False
    with _kinds_of_pages(model.config):
        return SparseManager(model, given, batching, hints)


def _check(model: Any) -> None:
    config = model.config
    attending = getattr(config, "attention_layers", None)
    reasons = {
        "two stacks": config.is_encoder_decoder,
        "a pattern with marked tokens, which pages do not know of": config.uses_marks,
        "layers that choose keys by content, whose scores pages do not keep": config.chooses_keys,
        "decode='dense' in its configuration, and pages know one pattern for all tokens": config.decode == "dense",
        "layers with a state of their own, which pages do not keep": model._is_stateful
        or (attending is not None and len(attending) < config.num_hidden_layers),
    }
    what = next((reason for reason, holds in reasons.items() if holds), None)
    if what is not None:
        raise NotImplementedError(
            f"{type(model).__name__} has {what}, and takes no continuous batching (generate_batch); use generate, which takes padded "
            "batches"
        )


def _forgetting(config: Any) -> dict[int, Kept]:
    """The layers that need not keep all keys of a request, and what they keep."""
    found = {layer: read_kept(config.layer_pattern(layer, is_causal=True)) for layer in range(config.num_hidden_layers)}
    return {
        layer: kept
        for layer, kept in found.items()
        if isinstance(kept, Kept) and kept.left is not None and kept.pinned is None
    }


@contextmanager
def _kinds_of_pages(config: Any) -> Iterator[None]:
    """Within, the configuration says which layers slide by the pattern, which need not share the window of the dense family."""
    kept, forgetting = copy.deepcopy(config), _forgetting(config)
    # nobody asks this copy for patterns, and one with patterns says that others change none
    kept.sparse_attention = None
    kept.layer_types = [RING if layer in forgetting else ALL_KEPT for layer in range(config.num_hidden_layers)]
    kept.sliding_window = RingOfPages.slots(joined(forgetting.values())) if forgetting else None
    # found before the class's own
    config.__dict__["get_text_config"] = lambda *args, **kwargs: kept
    try:
        yield
    finally:
        del config.__dict__["get_text_config"]


def bounds_of_pages(kwargs: Mapping[str, Any]) -> dict[int, Bounds]:
    """Where requests stand in a row, by layer; read off the device once a pass."""
    new = kwargs["cu_seq_lens_q"].tolist()
    of_kind = {}
    for kind, ends in kwargs["cu_seq_lens_k"].items():
        keys = ends.tolist()
        pairs = zip(new, new[1:], keys, keys[1:], strict=False)
        of_kind[kind] = [(q0, q1, k0, k1) for q0, q1, k0, k1 in pairs if q1 > q0]
    return {layer: of_kind[pages.layer_type] for layer, pages in kwargs["cache"].layer_to_allocator.items()}


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: str, scoring: Scoring, bounds: Bounds, backend: str,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`[1, Q, H, D]` of `[1, H, Q, D]` and `[1, G, K, D]`, request by request; places of none hold 0.

    Args:
        sinks: `[H]`, see `with_sink`.
    """
    found = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    for q0, q1, k0, k1 in bounds:
        call = AttentionCall(
            query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], pattern, (k1 - k0) - (q1 - q0), scoring, NO_DROPOUT,
            NOTHING, wants_lse=sinks is not None,
        )  # fmt: skip
        out, lse = attention(call, backend)
        found[:, q0:q1] = (out if sinks is None else with_sink(out, lse, sinks)).transpose(1, 2)
    return found
