"""sparse_qwen2: Qwen2 (arXiv:2407.10671) with sparse attention."""

from transformers import Qwen2Config

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseQwen2Config(SparseConfigMixin, Qwen2Config):
    model_type = "sparse_qwen2"


register_family(SparseQwen2Config, ROTARY)
