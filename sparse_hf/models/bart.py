"""sparse_bart: BART (arXiv:1910.13461) with sparse self-attention in encoder and decoder."""

from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartEncoder

from .hf.encoder_decoder import SparseEncoderDecoderConfigMixin
from .hf.model_mixin import SparseEncoderMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseBartConfig(SparseEncoderDecoderConfigMixin, BartConfig):
    model_type = "sparse_bart"


class SparseBartEncoder(SparseEncoderMixin, BartEncoder):
    config: SparseBartConfig


# two more rows than `max_position_embeddings` says
POSITIONS = Positions("learned", ("embed_positions.weight",), offset=2)

register_family(SparseBartConfig, POSITIONS, parts={BartEncoder: SparseBartEncoder})
