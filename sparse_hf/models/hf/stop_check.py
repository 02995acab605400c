"""When `generate` learns that a text has ended: a token late on a GPU, which so never waits for the next pass.

Transformers' loop asks behind each token whether it was the last, and waits for the device to know. The device then has nothing to do
until the host has prepared the next pass and launched its graph, which takes as long as the weights of a small model. Transformers has
a check that asks while the next pass is under way, for "mps" alone; compiled steps of ours take it on GPUs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PrefixConstrainedLogitsProcessor
from transformers.generation import utils

from .cache import cached_tokens, given_cache, room_of
from .late import late_tokens
from .marks import prompt_length
from .streaming_cache import StreamingCache

# what Transformers' loop calls the check, among the names of its module
CHECK = "DeferredStopCheck"
# the attribute of a cache whose steps come one by one, in a loop that is one ahead
AHEAD = "sparse_hf_ahead"
# that check, which is private there, and the arguments by which it is known
Parent: Any = getattr(utils, CHECK, object)
ARGUMENTS = ["self", "input_ids", "max_length", "cache", "cache_is_returned", "streamer"]
# whose criteria and processors may be asked of a token behind the end
OWN_PACKAGES = ("transformers", __name__.partition(".")[0])


def why_not_late(
    model: Any, input_ids: Tensor, generation_config: Any, max_length: int | None, kwargs: Mapping[str, Any]
) -> str | None:
    """Why each token of a call of `generate` is waited for; None if the host may be one ahead.

    Where a text ends before its greatest length, one more pass is under way by then, over a token that is dropped. The model and the
    cache must have a place for it.

    Args:
        input_ids: `[B, N]`, the prompt; what only a cache or embeddings hold is not among them.
        max_length: of what `input_ids` becomes; None where it may become of any.
        kwargs: further ones of the loop, those of the model among them.
    """
    if generation_config.is_assistant:
        return "drafts are short"
    if kwargs.get("synced_gpus"):
        return "processes wait for each other at every token"
    if not late_tokens(model.device):
        return f"a {model.device.type} is waited for anyway"
    if model.config.is_encoder_decoder or not model._valid_auto_compile_criteria(kwargs, generation_config):
        return "steps are not compiled, and the host takes longer for them than the device"
    positions, room = model.config.positions, room_of(given_cache(kwargs))
    table = positions.length_of(model.config) if positions is not None and positions.has_table else None
    least = min((limit for limit in (room, table) if limit is not None), default=None)
    if least is None:
        return None
    if max_length is None:
        return f"nothing says whether a text ends before its {least} tokens"
    before = max(0, (prompt_length(generation_config, kwargs) or 0) - input_ids.shape[1])
    if before + max_length - 1 > least:
        return f"the pass behind the last token might be one too many for {least}"
    return None


def pop_last_positions(cache: Cache | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Take from arguments that grow with each token what a step of `sample_late` does not read: the host is slower than the device.

    A step has the positions of its own tokens alone, and a `StreamingCache` knows the padding.

    Args:
        kwargs: of the model in `generate`, behind a pass.

    Returns:
        the positions `[..., 1]` of the last token; None where `kwargs` are to be made longer as ever.
    """
    if not getattr(cache, AHEAD, False):
        return None
    if isinstance(cache, StreamingCache) and cache.settled:
        kwargs["attention_mask"] = None
    positions = kwargs.pop("position_ids", None)
    return None if positions is None else positions[..., -1:]


def why_not_asked_again(listed: Iterable[Any]) -> str | None:
    """Why criteria and processors cannot be asked of a token behind the end; None if they can. Those of users may count or raise."""
    for one in listed:
        if type(one).__module__.partition(".")[0] not in OWN_PACKAGES or isinstance(
            one, PrefixConstrainedLogitsProcessor
        ):
            return f"{type(one).__name__} is not to be asked of a token behind the end"
    return None


def sample_late(sample: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a loop of Transformers with a late check; nobody else's has one.

    Args:
        sample: `GenerationMixin._sample`, whose other arguments follow. Where it has no such check, it runs as it is.
    """
    names = getattr(sample, "__globals__", {})
    is_known = Parent is not object and list(inspect.signature(Parent.__init__).parameters) == ARGUMENTS
    if not is_known or not isinstance(sample, FunctionType) or names.get(CHECK) is not Parent:
        return sample(*args, **kwargs)
    checks = _Checks()
    ours = FunctionType(
        sample.__code__, {**names, CHECK: checks}, sample.__name__, sample.__defaults__, sample.__closure__
    )
    ours.__kwdefaults__ = sample.__kwdefaults__
    cache = given_cache(kwargs)
    setattr(cache, AHEAD, True)
    try:
        return ours(*args, **kwargs)
    # KeyboardInterrupt is none of Exception
    except BaseException:
        checks.take_back()
        raise
    finally:
        setattr(cache, AHEAD, False)


class _Checks:
    """What makes the check of one call, and can be asked for it: it stands where Transformers' loop has a class."""

    made: LateStopCheck | None = None

    @staticmethod
    def is_supported(device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool) -> bool:
        return not is_assistant and (not cache_is_returned or cache is not None and cache.is_croppable)

    def __call__(self, *args: Any) -> LateStopCheck:
        self.made = LateStopCheck(*args)
        return self.made

    def take_back(self) -> None:
        if self.made is not None:
            self.made.take_back()


class LateStopCheck(Parent):
    """Transformers' check, which reads of each token while the next pass is under way, for caches of compiled steps."""

    def __init__(
        self, input_ids: Any, max_length: int, cache: Cache | None, cache_is_returned: bool, streamer: Any = None
    ):
        # such caches can take a token back without having been told before
        super().__init__(input_ids, max_length, cache, False, streamer)
        self.cache = cache if cache_is_returned else None
        # a static cache gives its counter itself, which goes on with it
        self.calls, self.prompt = 0, cached_tokens(self.cache)

    def __call__(self, *args: Any) -> bool:
        self.calls += 1
        return super().__call__(*args)

    def take_back(self) -> None:
        """Behind an interruption, have a cache hold none but tokens before the last that its streamer got, so that a call can go on."""
        if self.cache is None or self.streamer is None:
            return
        more = cached_tokens(self.cache) - self.prompt - max(0, self.calls - 2)
        if more > 0:
            self.cache.crop(-more)
