"""Sparse models: derived from Transformers' own classes, registered with its Auto classes."""

from importlib import import_module

from . import seam  # noqa: F401  (registers our attention with Transformers)
from .block_sparse import transformers_random_blocks
from .config import SparseConfigMixin
from .families import FAMILIES, Family, Positions, dense_class, family_of, register_family
from .layers import parse_layers
from .mixin import SparseMixin
from .sparsify import sparsify
from .streaming_cache import StreamingCache

__all__ = [
    "FAMILIES",
    "Family",
    "Positions",
    "SparseConfigMixin",
    "SparseMixin",
    "StreamingCache",
    "dense_class",
    "family_of",
    "parse_layers",
    "register_family",
    "sparsify",
    "transformers_random_blocks",
]

# a module per family
MODULES = (
    "albert",
    "bart",
    "bert",
    "big_bird",
    "bigbird_pegasus",
    "camembert",
    "distilbert",
    "electra",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "led",
    "llama",
    "longformer",
    "mbart",
    "mistral",
    "mixtral",
    "modernbert",
    "opt",
    "pegasus",
    "perceiver",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "reformer",
    "roberta",
    "smollm3",
    "t5",
    "xlm_roberta",
)
for _name in MODULES:
    _module = import_module(f".{_name}", __name__)
    # its configuration and its heads, which `register_family` lists there
    globals().update({name: getattr(_module, name) for name in _module.__all__})
    __all__ += _module.__all__
