"""A cache takes all tokens of a pass or none: what cannot fit is refused before, and what a pass that fails has left is taken back.

Layers take their tokens one after the other, each with a counter of its own, and Transformers' caches ask none but the first where a
text ends. So a pass that was interrupted between two of them (by Ctrl-C, by memory that is not there) would have later answers wrong
and nobody would say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import ref

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache import GrownStaticLayer, cached_tokens, empty, given_cache, parts_of, room_of
from .streaming_cache import StreamingCache

# the attribute of a cache from which a failed pass could not be taken back
TORN = "sparse_hf_torn"
# arguments whose first dimension is that of the rows of a cache
ROWS_OF = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


def check_fits(config: Any, cache: Cache | None, kwargs: Mapping[str, Any], new: int) -> None:
    """Refuse a pass that its cache cannot take; the cache is left as it is. A `StreamingCache` looks itself, see its `begin`.

    Args:
        config: of the model.
        kwargs: arguments of `forward` by name.
        new: tokens of the pass.

    Raises:
        ValueError: other rows than the cache holds, no room in a static one, or one that a failed pass has left torn.
    """
    if cache is None or isinstance(cache, StreamingCache):
        return
    held = cached_tokens(cache)
    if getattr(cache, TORN, False):
        if held:
            raise ValueError(
                f"a pass was interrupted between the layers of this {type(cache).__name__}, and layers of its kind cannot give back what "
                "some of them have taken: begin anew with another cache, or go on from a copy of an earlier time (copy.deepcopy)"
            )
        setattr(cache, TORN, False)
    rows, given = _rows_of(cache), next((kwargs[name] for name in ROWS_OF if kwargs.get(name) is not None), None)
    # families of sounds may give each codebook a row of ids
    books = getattr(config, "num_codebooks", None) or 1
    most = room_of(cache)
    if rows is not None and given is not None and given.shape[0] not in (rows, rows * books):
        remedy = "give another cache"
        if most is None:
            remedy += ", or choose rows of this one with cache.batch_select_indices and cache.batch_repeat_interleave"
        raise ValueError(
            f"the {type(cache).__name__} holds {held} tokens of {rows} rows, and this batch has {given.shape[0]}, of which each beam and "
            f"each returned sequence is one: {remedy}"
        )
    if most is not None and held + new > most:
        raise ValueError(
            f"the static cache holds {most} tokens, and with this pass there would be {held + new}; make one with a greater "
            "max_cache_len, or begin anew with cache.reset()"
        )


def _rows_of(cache: Cache) -> int | None:
    """Rows that a cache has keys of; None of one without any."""
    keys = (layer.keys for layer in parts_of(cache)[0].layers if isinstance(layer, (DynamicLayer, StaticLayer)))
    return next((held.shape[0] for held in keys if held is not None and held.ndim == 4), None)


def whole_pass(kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Around a pass of these arguments of `forward`: if it raises an error, its cache is as it was before, or says that it is not."""
    cache = given_cache(kwargs)
    return nullcontext() if torch.compiler.is_compiling() or not isinstance(cache, Cache) else _whole_pass(cache)


@contextmanager
def _whole_pass(cache: Cache) -> Iterator[None]:
    before, states = cached_tokens(cache), _states(cache)
    try:
        yield
    # KeyboardInterrupt is none of Exception
    except BaseException:
        _go_back(cache, before, states)
        raise


def _states(cache: Cache) -> list[Any]:
    """What tells whether layers that cannot be made shorter have taken anything: which tensors, and how often each was written to.

    No tensor is held, so that keys which a pass replaces are free while it goes on.
    """
    if isinstance(cache, StreamingCache):
        return []
    return [_tensors(vars(layer)) for layer in parts_of(cache)[0].layers if type(layer) not in KNOWN]


def _tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # those of `inference_mode` do not count
        return ref(value), value.shape, None if value.is_inference() else value._version
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return None
    return [_tensors(one) for one in value]


def _are_same(before: Any, now: Any) -> bool:
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_are_same, before, now))
    if isinstance(before, tuple) and isinstance(now, tuple):
        return before[0]() is now[0]() and before[1:] == now[1:] and before[2] is not None
    return before is None and now is None


def _go_back(cache: Cache, tokens: int, states: list[Any]) -> None:
    """Have a cache hold so many tokens again, the first ones.

    Args:
        states: of layers of other kinds, before the pass.
    """
    if not tokens:
        empty(cache)
    elif isinstance(cache, StreamingCache):
        cache.go_back(tokens)
    else:
        layers = parts_of(cache)[0].layers
        for layer in layers:
            _shorten(layer, tokens)
        # states of another kind, compressed or quantized keys
        setattr(cache, TORN, not _are_same(states, _states(cache)))


# layers that can be made shorter, whatever came between their keys and their values
KNOWN = (DynamicLayer, StaticLayer, GrownStaticLayer)


def _shorten(layer: Any, tokens: int) -> None:
    if isinstance(layer, StaticLayer):
        if layer.is_initialized:
            # what stands behind is overwritten
            layer.cumulative_length.fill_(tokens)
    elif type(layer) is DynamicLayer and layer.is_initialized:
        assert layer.keys is not None and layer.values is not None
        layer.keys, layer.values = (t[..., :tokens, :] if t.ndim == 4 else t for t in (layer.keys, layer.values))
