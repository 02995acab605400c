"""What a candidate costs beside dense attention: seconds, tokens per second, memory, bytes of the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from ...bench.measure import peak_bytes, synchronize
from ...models.hf.streaming_cache import StreamingCache
from ..generation import go_on, last_alone, prefill
from ..pieces import Finished, Found, Piece
from ..subject import Contender
from .base import Setup, of_contenders

# passes that are timed, of which the least counts, and tokens that are decoded for a mean
PASSES, TOKENS = 2, 8


class Cost:
    """A pass over a text, and for decoders the next tokens behind a cache, length by length.

    Where every layer's pattern allows, the cache is a `StreamingCache`, which drops what is never seen again.
    """

    name: ClassVar[str] = "cost"

    def why_not(self, setup: Setup) -> str | None:
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        for n, length in enumerate(setup.settings.all_lengths):
            text = text_of_length(setup, length)
            what = {"length": length, "device": str(setup.subject.device)}
            yield from of_contenders(self.name, setup, _measured, text, what, (4, n))

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        found: dict[str, list[Found]] = {}
        for piece in finished:
            found.setdefault(piece.candidate, []).append({"length": piece.what["length"], **piece.found})
        return {"lengths": list(setup.settings.all_lengths), "candidates": found}


def text_of_length(setup: Setup, length: int) -> Tensor:
    """The samples one behind the other, as often as it takes: `[1, length]`."""
    ids = torch.cat([sample.ids for sample in setup.samples], 1)
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length]


def _measured(setup: Setup, contender: Contender, ids: Tensor) -> Found:
    setup.passes.forget()
    ids = ids.to(contender.model.device)
    with torch.inference_mode():
        # the first pass may make plans and compile
        read_once(contender, ids)
        peak = peak_bytes(lambda: read_once(contender, ids), ids.device)
        seconds = min(_seconds(lambda: read_once(contender, ids), ids.device) for _ in range(PASSES))
        found = {"seconds": seconds, "tokens_per_second": ids.shape[1] / seconds, "peak_bytes": peak}
        return found | (_decoding(contender, ids) if setup.subject.is_causal else {})


def read_once(contender: Contender, ids: Tensor) -> Any:
    """A pass over a text, of whose tokens the last alone is answered."""
    options = {"use_cache": False, **last_alone(contender.model)} if contender.model.can_generate() else {}
    return contender.model(input_ids=ids, **options)


def _decoding(contender: Contender, ids: Tensor) -> Found:
    # the tokens that are decoded are the last of the text, beyond which there may be no positions
    _, cache = prefill(contender.model, ids[:, : -TOKENS - 1], streaming_cache(contender))
    token = ids[:, -1:]
    go_on(contender.model, token, cache)

    def decode() -> None:
        for _ in range(TOKENS):
            go_on(contender.model, token, cache)

    return {
        "seconds_per_token": _seconds(decode, ids.device) / TOKENS,
        "cache_bytes": cache_bytes(cache),
        "cache": type(cache).__name__,
    }


def streaming_cache(contender: Contender) -> Cache | None:
    """A cache that drops what the patterns never see again; None where they may see any key."""
    try:
        return None if contender.is_dense else StreamingCache(contender.config)
    except ValueError:
        # its message names the layer that sees too much; a cache that keeps all is right for it
        return None


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds."""
    # layers of another kind than attention keep states in place of keys
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def _seconds(work: Any, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin
