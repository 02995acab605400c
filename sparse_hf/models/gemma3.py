"""sparse_gemma3_text: Gemma 3 (arXiv:2503.19786), text only, with sparse attention."""

from transformers import Gemma3TextConfig

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseGemma3TextConfig(SparseConfigMixin, Gemma3TextConfig):
    model_type = "sparse_gemma3_text"


register_family(SparseGemma3TextConfig, ROTARY)
