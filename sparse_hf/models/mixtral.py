"""sparse_mixtral: Mixtral (arXiv:2401.04088) with sparse attention."""

from transformers import MixtralConfig

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseMixtralConfig(SparseConfigMixin, MixtralConfig):
    model_type = "sparse_mixtral"


register_family(SparseMixtralConfig, ROTARY)
