"""sparse_opt: OPT (arXiv:2205.01068) with sparse attention."""

from transformers import OPTConfig

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseOPTConfig(SparseConfigMixin, OPTConfig):
    model_type = "sparse_opt"


# two more rows than `max_position_embeddings` says
POSITIONS = Positions("learned", ("embed_positions.weight",), offset=2, skips_padding=True)

register_family(SparseOPTConfig, POSITIONS)
