"""sparse_gemma2: Gemma 2 (arXiv:2408.00118) with sparse attention."""

from transformers import Gemma2Config

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseGemma2Config(SparseConfigMixin, Gemma2Config):
    model_type = "sparse_gemma2"


register_family(SparseGemma2Config, ROTARY)
