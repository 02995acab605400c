"""sparse_xlm_roberta: XLM-RoBERTa (arXiv:1911.02116) with sparse attention."""

from transformers import XLMRobertaConfig

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseXLMRobertaConfig(SparseConfigMixin, XLMRobertaConfig):
    model_type = "sparse_xlm_roberta"


# positions begin behind the padding id, and `max_position_embeddings` counts all rows (514 for 512 tokens)
POSITIONS = Positions(
    "learned",
    ("embeddings.position_embeddings.weight",),
    ("embeddings.position_ids", "embeddings.token_type_ids"),
    offset=2,
    counted=True,
    skips_padding=True,
)

register_family(SparseXLMRobertaConfig, POSITIONS)
