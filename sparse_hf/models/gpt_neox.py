"""sparse_gpt_neox: GPT-NeoX (arXiv:2204.06745) with sparse attention."""

from transformers import GPTNeoXConfig

from .config import SparseConfigMixin
from .families import ROTARY, register_family


class SparseGPTNeoXConfig(SparseConfigMixin, GPTNeoXConfig):
    model_type = "sparse_gpt_neox"


register_family(SparseGPTNeoXConfig, ROTARY)
