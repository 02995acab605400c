"""Continuous batching: the new tokens of several requests in one row, and their keys in pages of one memory.

Transformers schedules requests, writes their keys to pages, and hands each layer the keys of all requests one behind the other.
Attention of a request is then a call of its own, whose queries are the last of its keys, so that its pattern counts from its own
first token. Pages behind a window are not given back: Transformers keeps them for as long as the request lives.

Legend: B batch, H query heads, G key heads, Q new tokens of all requests, K keys of all requests, D head dim.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...attention import attention
from ...attention.backend import AttentionCall
from ...attention.dropout import NO_DROPOUT
from ...attention.merge import with_sink
from ...attention.scoring import Scoring
from ...plan import NOTHING

# the one kind of pages that keeps all tokens of a request
ALL_KEPT = "full_attention"

# where the new tokens and the keys of a request stand: begin and end of both
Bounds = list[tuple[int, int, int, int]]


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
            with _pages_are_kept(self.model.config):
                return super()._create_batch_processor()

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
    with _pages_are_kept(model.config):
        return SparseManager(model, given, batching, hints)


def _check(model: Any) -> None:
    config = model.config
    attending = getattr(config, "attention_layers", None)
    reasons = {
        "two stacks": config.is_encoder_decoder,
        "a pattern with marked tokens, which pages do not know of": config.uses_marks,
        "layers that choose keys by content, whose scores pages do not keep": config.chooses_keys,
        "layers with a state of their own, which pages do not keep": model._is_stateful
        or (attending is not None and len(attending) < config.num_hidden_layers),
    }
    what = next((reason for reason, holds in reasons.items() if holds), None)
    if what is not None:
        raise NotImplementedError(
            f"{type(model).__name__} has {what}, and takes no continuous batching (generate_batch); use generate, which takes padded "
            "batches"
        )


@contextmanager
def _pages_are_kept(config: Any) -> Iterator[None]:
    """Within, the configuration says of no layer that it slides.

    Transformers would give pages back by the window of the dense family, which the pattern need not share.
    """
    kept = copy.deepcopy(config)
    # nobody asks this copy for patterns, and one with patterns says that others change none
    kept.sparse_attention = None
    kept.layer_types, kept.sliding_window = [ALL_KEPT] * config.num_hidden_layers, None
    # found before the class's own
    config.__dict__["get_text_config"] = lambda *args, **kwargs: kept
    try:
        yield
    finally:
        del config.__dict__["get_text_config"]


def bounds_of_pages(kwargs: Mapping[str, Any]) -> Bounds:
    """Where requests stand in a row, read off the device once a pass."""
    new, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"][ALL_KEPT].tolist()
    ends = zip(new, new[1:], keys, keys[1:], strict=False)
    return [(q0, q1, k0, k1) for q0, q1, k0, k1 in ends if q1 > q0]


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
