"""sparse_pegasus: PEGASUS (arXiv:1912.08777) with sparse self-attention in encoder and decoder."""

from transformers import PegasusConfig
from transformers.models.pegasus.modeling_pegasus import PegasusEncoder

from .hf.encoder_decoder import SparseEncoderDecoderConfigMixin
from .hf.model_mixin import SparseEncoderMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparsePegasusConfig(SparseEncoderDecoderConfigMixin, PegasusConfig):
    model_type = "sparse_pegasus"


class SparsePegasusEncoder(SparseEncoderMixin, PegasusEncoder):
    config: SparsePegasusConfig


POSITIONS = Positions("sinusoidal", ("embed_positions.weight",))

register_family(SparsePegasusConfig, POSITIONS, parts={PegasusEncoder: SparsePegasusEncoder})
