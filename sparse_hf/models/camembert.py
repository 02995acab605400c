"""sparse_camembert: CamemBERT (arXiv:1911.03894) with sparse attention."""

from transformers import CamembertConfig

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseCamembertConfig(SparseConfigMixin, CamembertConfig):
    model_type = "sparse_camembert"


# positions begin behind the padding id, and `max_position_embeddings` counts all rows (514 for 512 tokens)
POSITIONS = Positions(
    "learned",
    ("embeddings.position_embeddings.weight",),
    ("embeddings.position_ids", "embeddings.token_type_ids"),
    offset=2,
    counted=True,
    skips_padding=True,
)

register_family(SparseCamembertConfig, POSITIONS)
