"""sparse_gpt2: GPT-2 (Radford et al., 2019) with sparse attention."""

from transformers import GPT2Config

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseGPT2Config(SparseConfigMixin, GPT2Config):
    model_type = "sparse_gpt2"


POSITIONS = Positions("learned", ("wpe.weight",))

register_family(SparseGPT2Config, POSITIONS)
