"""sparse_mixtral: Mixtral (arXiv:2401.04088) with sparse attention."""

from transformers import MixtralConfig

from .hf.config import SparseConfigMixin
from .hf.register import ROTARY, register_family


class SparseMixtralConfig(SparseConfigMixin, MixtralConfig):
    model_type = "sparse_mixtral"


register_family(SparseMixtralConfig, ROTARY)
