"""sparse_gpt_neox: GPT-NeoX (arXiv:2204.06745) with sparse attention."""

from transformers import GPTNeoXConfig

from .hf.config import SparseConfigMixin
from .hf.register import ROTARY, register_family


class SparseGPTNeoXConfig(SparseConfigMixin, GPTNeoXConfig):
    model_type = "sparse_gpt_neox"


register_family(SparseGPTNeoXConfig, ROTARY)
