"""sparse_mbart: mBART (arXiv:2001.08210) with sparse self-attention in encoder and decoder."""

from transformers import MBartConfig
from transformers.models.mbart.modeling_mbart import MBartEncoder

from .hf.encoder_decoder import SparseEncoderDecoderConfigMixin
from .hf.model_mixin import SparseEncoderMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseMBartConfig(SparseEncoderDecoderConfigMixin, MBartConfig):
    model_type = "sparse_mbart"


class SparseMBartEncoder(SparseEncoderMixin, MBartEncoder):
    config: SparseMBartConfig


# two more rows than `max_position_embeddings` says
POSITIONS = Positions("learned", ("embed_positions.weight",), offset=2)

register_family(SparseMBartConfig, POSITIONS, parts={MBartEncoder: SparseMBartEncoder})
