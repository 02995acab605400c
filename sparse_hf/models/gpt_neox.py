"""sparse_gpt_neox: GPT-NeoX (arXiv:2204.06745) with sparse attention."""

from transformers import GPTNeoXConfig

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseGPTNeoXConfig(SparseConfigMixin, GPTNeoXConfig):
    model_type = "sparse_gpt_neox"


register_family(SparseGPTNeoXConfig, ROTARY)
