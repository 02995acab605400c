"""What a converted folder says of the cache with which `generate` decodes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import configuration_utils
from transformers.utils import GENERATION_CONFIG_NAME

from ..models.hf.config import SparseConfigMixin
from ..models.hf.streaming_cache import StreamingCache, why_not_by_default
from ..models.names import STREAMING
from .carry import read_json, update_json

KEY = "cache_implementation"


class CacheChoice(NamedTuple):
    """The `cache_implementation` that is written, None: whatever the dense folder says; and why it is none that streams."""

    name: str | None
    why_not_streaming: str | None = None


def choose_cache(config: SparseConfigMixin, model: PreTrainedModel, wanted: str | None) -> CacheChoice | None:
    """The cache of a model that generates: "streaming" wherever every layer can do with it, unless another is wanted.

    Raises:
        ValueError: an unknown name, a cache for a model that does not generate, or "streaming" where a layer's pattern has no end.
    """
    known = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    if wanted is not None and wanted not in known:
        raise ValueError(f"cache is {wanted!r}; it must be one of {', '.join(known)}")
    if not model.can_generate():
        if wanted is not None:
            raise ValueError(f"cache is {wanted!r}, and {type(model).__name__} does not generate; leave it out")
        return None
    if wanted == STREAMING:
        # raises, with the layer and its pattern
        StreamingCache(config)
    if wanted is not None:
        return CacheChoice(wanted)
    reason = why_not_by_default(config)
    return CacheChoice(None, reason) if reason else CacheChoice(STREAMING)


def write_cache(folder: Path, config: SparseConfigMixin, choice: CacheChoice | None) -> None:
    """Write the choice into the `generation_config.json` of a folder, which is made where there is none."""
    if choice is None or choice.name is None:
        return
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        # special tokens are found in the model's configuration as long as there is no such file
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    update_json(folder / GENERATION_CONFIG_NAME, **{KEY: choice.name})


def forget_streaming(folder: Path) -> None:
    """Have a folder of a dense model say nothing of a cache that only sparse ones have."""
    path = folder / GENERATION_CONFIG_NAME
    if path.is_file() and read_json(path).get(KEY) == STREAMING:
        update_json(path, **{KEY: None})
