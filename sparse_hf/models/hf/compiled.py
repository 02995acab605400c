"""What a compiled step of `generate` checks at every token, and what it checks once a call.

A graph is right as long as what it was made of is as it was. Compiled code asks that of each module, attribute and hook before each
token, which takes longer than the attention does. Nobody changes a model between two tokens of one call, so the model is looked at
once a call instead: if it is another one than before, it gets another version, which is asked for at every token, and so another
graph. Arguments, caches and settings of torch are asked for as ever.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ...registry import ENTRIES
from .cache import first_tokens, given_cache
from .dense_family import DenseFamily
from .positions import changing_angles
from .streaming_cache import StreamingCache

# what `mode="reduce-overhead"` stands for, beside which torch takes no options
CUDA_GRAPHS = {"triton.cudagraphs": True}
FILTER = "guard_filter_fn"
# a guard on the model or its class
OF_MODEL = re.compile(r"(?:\w+\()*self\b")
VERSION = "graph_version"
# attributes of a model that say nothing of what it computes
OWN = {VERSION, "_compiled_state", "_compiled_call", "_last_compile_config", "_previous_max_cache_length"}
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
# what hooks are kept in: there are none in nearly all attributes of a module
HOOKS = frozenset((OrderedDict, dict, set))
_VERSIONS = count(1)
# tokens at most that a draft goes on with: the last one of a draft that was right to its end, and the one behind it
DRAFT_BEGINS = 2


def lean_config(model: Any, config: Any) -> Any:
    """A `CompileConfig` whose graphs ask once a call of `generate` whether the model is the one that they were made of.

    It is called once a call. The configuration is given back as it is where modules of a model remember something of a text, or where
    it holds settings of torch that this one cannot stand beside.
    """
    if config.mode not in (None, "default", "reduce-overhead") or FILTER in (config.options or {}):
        return config
    if (
        config.mode == "reduce-overhead"
        and (config.options or config.backend != "inductor")
        or not forgets_texts(model)
    ):
        return config
    state = state_of(model)
    if vars(model).get("_compiled_state") != state:
        # constants are compared by what they are, a number might be taken for one of many
        setattr(model, VERSION, f"version {next(_VERSIONS)}")
        model._compiled_state = state
    lean = copy.copy(config)
    lean.options = {
        **(config.options or {}),
        **(CUDA_GRAPHS if config.mode == "reduce-overhead" else {}),
        FILTER: keep_guards,
    }
    lean.mode = None
    return lean


def forgets_texts(model: Any) -> bool:
    """Do modules of a model compute the same whatever they have computed before?

    Angles of some rotary schemes are those of the longest text so far. Families that were derived by themselves may do anything.
    """
    is_known = any(isinstance(e, DenseFamily) and e.sparse_type == model.config.model_type for e in ENTRIES)
    return is_known and changing_angles(model.config) is None


def keep_guards(guards: Sequence[Any]) -> list[bool]:
    """Which guards of a graph are asked at every token: those on all but the model, if its version is among them."""
    is_known = any(guard.name == f"self.{VERSION}" for guard in guards)
    return [not is_known or guard.name == f"self.{VERSION}" or not OF_MODEL.match(guard.name) for guard in guards]


def draft_on(model: Any, input_ids: Tensor, generation_config: Any, kwargs: dict[str, Any]) -> Any:
    """What a model says behind its draft's last right tokens, read one by one in the graph of a step; None if that is not to be.

    Each draft begins with a pass over one or two tokens, the last right ones, which `generate` would not compile.

    Args:
        model, input_ids, generation_config, kwargs: of `generate`, whose `_prefill` this stands in for.
    """
    cache = given_cache(kwargs)
    if not generation_config.is_assistant or not isinstance(cache, StreamingCache) or not cache.settled:
        return None
    held, tokens = cache.get_seq_length(), input_ids.shape[1]
    if not held < tokens <= held + DRAFT_BEGINS or kwargs.get("global_attention_mask") is not None:
        return None
    if not model._valid_auto_compile_criteria(kwargs, generation_config):
        return None
    # the loop that this pass comes before has just asked whether the model is the same
    forward = getattr(model, "_compiled_call", None) or model.get_compiled_call(generation_config.compile_config)
    outputs = None
    for length in range(held + 1, tokens + 1):
        inputs = model.prepare_inputs_for_generation(
            input_ids[:, :length], next_sequence_length=1, **first_tokens(kwargs, length)
        )
        outputs = forward(**inputs, return_dict=True)
    return outputs


def state_of(model: nn.Module) -> tuple:
    """What a graph of a model depends on: its modules, their attributes and hooks, and shapes and dtypes of its weights."""
    seen: set[int] = set()
    return tuple(
        (
            id(module),
            type(module),
            *((name, _plain(value, seen)) for name, value in vars(module).items() if name not in OWN),
        )
        for module in model.modules()
    )


def _plain(value: Any, seen: set[int]) -> Any:
    """A value as something that can be compared and holds no tensor."""
    if type(value) in HOOKS and not value:
        return ()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, (dict, list, tuple, set, PreTrainedConfig)):
        if id(value) in seen:
            return id(value)
        seen.add(id(value))
        if isinstance(value, dict):
            return tuple((key, _plain(one, seen)) for key, one in value.items())
        if isinstance(value, PreTrainedConfig):
            return id(value), tuple((key, _plain(one, seen)) for key, one in vars(value).items())
        return tuple(_plain(one, seen) for one in value)
    return id(value)
