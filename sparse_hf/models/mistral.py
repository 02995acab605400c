"""sparse_mistral: Mistral (arXiv:2310.06825) with sparse attention."""

from transformers import MistralConfig

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseMistralConfig(SparseConfigMixin, MistralConfig):
    model_type = "sparse_mistral"


register_family(SparseMistralConfig, ROTARY)
