"""sparse_bert: BERT (arXiv:1810.04805) with sparse attention."""

from transformers import BertConfig

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseBertConfig(SparseConfigMixin, BertConfig):
    model_type = "sparse_bert"


POSITIONS = Positions(
    "learned", ("embeddings.position_embeddings.weight",), ("embeddings.position_ids", "embeddings.token_type_ids")
)

register_family(SparseBertConfig, POSITIONS)
