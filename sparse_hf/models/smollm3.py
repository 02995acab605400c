"""sparse_smollm3: SmolLM3 with sparse attention."""

from transformers import SmolLM3Config

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseSmolLM3Config(SparseConfigMixin, SmolLM3Config):
    model_type = "sparse_smollm3"


register_family(SparseSmolLM3Config, ROTARY)
