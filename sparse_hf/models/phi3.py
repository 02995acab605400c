"""sparse_phi3: Phi-3 (arXiv:2404.14219) with sparse attention."""

from transformers import Phi3Config

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparsePhi3Config(SparseConfigMixin, Phi3Config):
    model_type = "sparse_phi3"


register_family(SparsePhi3Config, ROTARY)
