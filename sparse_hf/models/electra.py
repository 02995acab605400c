"""sparse_electra: ELECTRA (arXiv:2003.10555) with sparse attention."""

from transformers import ElectraConfig

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseElectraConfig(SparseConfigMixin, ElectraConfig):
    model_type = "sparse_electra"


POSITIONS = Positions(
    "learned", ("embeddings.position_embeddings.weight",), ("embeddings.position_ids", "embeddings.token_type_ids")
)

register_family(SparseElectraConfig, POSITIONS)
