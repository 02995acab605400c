"""sparse_distilbert: DistilBERT (arXiv:1910.01108) with sparse attention."""

from typing import Any

from transformers import DistilBertConfig
from transformers.models.distilbert.modeling_distilbert import Transformer

from .hf.config import SparseConfigMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseDistilBertConfig(SparseConfigMixin, DistilBertConfig):
    model_type = "sparse_distilbert"


class SparseDistilBertTransformer(Transformer):
    """The stack of layers, whose attention does not know which layer it belongs to."""

    def number_layers(self) -> None:
        for index, layer in enumerate(self.layer):
            attention: Any = layer.attention
            attention.layer_idx = index


POSITIONS = Positions("learned", ("embeddings.position_embeddings.weight",), ("embeddings.position_ids",))

register_family(SparseDistilBertConfig, POSITIONS, parts={Transformer: SparseDistilBertTransformer})
