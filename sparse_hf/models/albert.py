"""sparse_albert: ALBERT (arXiv:1909.11942) with sparse attention."""

from transformers import AlbertConfig

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseAlbertConfig(SparseConfigMixin, AlbertConfig):
    model_type = "sparse_albert"

    def validate_sparse_attention(self) -> None:
        super().validate_sparse_attention()
        layers = (self.sparse_attention or {}).get("layers", [])
        if len(set(layers)) > 1:
            raise ValueError(
                f"sparse_attention.layers is {layers}; ALBERT's layers share their weights and do not know which one they "
                "are, so all need the same pattern"
            )


POSITIONS = Positions(
    "learned", ("embeddings.position_embeddings.weight",), ("embeddings.position_ids", "embeddings.token_type_ids")
)

register_family(SparseAlbertConfig, POSITIONS)
