"""Sparse attention for Transformers: one pattern language, every pattern exact on every backend.

Importing this registers the sparse models with the Auto classes and patches nothing.
"""

from .attention import sparse_attention
from .convert import convert
from .models import *  # noqa: F403
from .models import __all__ as _models
from .pattern import *  # noqa: F403
from .pattern import __all__ as _pattern
from .plan import BlockPlan, build_plan
from .version import __version__

__all__ = ["BlockPlan", "__version__", "build_plan", "convert", "sparse_attention", *_models, *_pattern]
