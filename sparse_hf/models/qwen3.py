"""sparse_qwen3: Qwen3 (arXiv:2505.09388) with sparse attention."""

from transformers import Qwen3Config

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseQwen3Config(SparseConfigMixin, Qwen3Config):
    model_type = "sparse_qwen3"


register_family(SparseQwen3Config, ROTARY)
