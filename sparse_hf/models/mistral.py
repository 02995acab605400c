"""sparse_mistral: Mistral (arXiv:2310.06825) with sparse attention."""

from transformers import MistralConfig

from .hf.config import SparseConfigMixin
from .hf.register import ROTARY, register_family


class SparseMistralConfig(SparseConfigMixin, MistralConfig):
    model_type = "sparse_mistral"


register_family(SparseMistralConfig, ROTARY)
