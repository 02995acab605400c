"""sparse_bart: BART (arXiv:1910.13461) with sparse self-attention in encoder and decoder."""

from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartEncoder

from .encoder_decoder import SparseEncoderDecoderConfigMixin
from .families import Positions, register_family
from .mixin import SparseEncoderMixin


class SparseBartConfig(SparseEncoderDecoderConfigMixin, BartConfig):
    model_type = "sparse_bart"


class SparseBartEncoder(SparseEncoderMixin, BartEncoder):
    config: SparseBartConfig


# two more rows than `max_position_embeddings` says
POSITIONS = Positions("learned", ("embed_positions.weight",), offset=2)

register_family(SparseBartConfig, POSITIONS, parts={BartEncoder: SparseBartEncoder})
