"""sparse_llama: Llama (arXiv:2302.13971, arXiv:2407.21783) with sparse attention."""

from transformers import LlamaConfig

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseLlamaConfig(SparseConfigMixin, LlamaConfig):
    model_type = "sparse_llama"


register_family(SparseLlamaConfig, ROTARY)
