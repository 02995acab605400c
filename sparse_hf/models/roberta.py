"""sparse_roberta: RoBERTa (arXiv:1907.11692) with sparse attention."""

from transformers import RobertaConfig

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseRobertaConfig(SparseConfigMixin, RobertaConfig):
    model_type = "sparse_roberta"


# positions begin behind the padding id, and `max_position_embeddings` counts all rows (514 for 512 tokens)
POSITIONS = Positions(
    "learned",
    ("embeddings.position_embeddings.weight",),
    ("embeddings.position_ids", "embeddings.token_type_ids"),
    offset=2,
    counted=True,
    skips_padding=True,
)

register_family(SparseRobertaConfig, POSITIONS)
