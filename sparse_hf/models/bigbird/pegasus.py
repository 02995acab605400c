"""sparse_big_bird_pegasus: BigBirdPegasus (arXiv:2007.14062, section 4.1): a sparse encoder, a causal decoder.

Without `sparse_attention` in the configuration the encoder is what `attention_type`, `block_size` and `num_random_blocks`
say, and the decoder sees all of its past.
"""

from typing import Any

from transformers import BigBirdPegasusConfig
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusBlockSparseAttention,
    BigBirdPegasusDecoder,
    BigBirdPegasusEncoder,
    BigBirdPegasusSelfAttention,
)

from ..hf.encoder_decoder import SparseEncoderDecoderConfigMixin
from ..hf.model_mixin import SparseEncoderMixin
from ..hf.positions import Positions
from ..hf.register import register_family
from .block_sparse import (
    FULL,
    PATH,
    BlockSparseAttentionMixin,
    BlockSparseConfigMixin,
    implied_text,
    refuse_attention_type,
)


class BlockSparseEncoderConfigMixin(BlockSparseConfigMixin, SparseEncoderDecoderConfigMixin):
    """Two stacks, of which the encoder is block-sparse."""


class SparseBigBirdPegasusConfig(BlockSparseEncoderConfigMixin, BigBirdPegasusConfig):
    model_type = "sparse_big_bird_pegasus"

    def implied_pattern(self, stack: str, layer: int) -> str:
        return implied_text(self, layer) if stack == "encoder" else FULL


class SparseBigBirdPegasusSelfAttention(BlockSparseAttentionMixin, BigBirdPegasusSelfAttention):
    """The encoder's self-attention by the pattern."""


class SparseBigBirdPegasusEncoder(SparseEncoderMixin, BigBirdPegasusEncoder):
    config: SparseBigBirdPegasusConfig

    def number_layers(self) -> None:
        self.attention_type = PATH
        layers: list[Any] = list(self.layers)
        for number, layer in enumerate(layers):
            attention = layer.self_attn
            attention.attention_type = PATH
            attention.self.config, attention.self.layer_idx, attention.self.is_decoder = self.config, number, False

    def set_attention_type(self, value: str) -> None:
        refuse_attention_type(value)


class SparseBigBirdPegasusDecoder(BigBirdPegasusDecoder):
    config: SparseBigBirdPegasusConfig

    def number_layers(self) -> None:
        layers: list[Any] = list(self.layers)
        for layer in layers:
            # Transformers leaves it to the mask to say so, and knows self-attention from cross-attention by names
            layer.self_attn.is_causal = True


POSITIONS = Positions("learned", ("embed_positions.weight",))
PARTS = {
    BigBirdPegasusEncoder: SparseBigBirdPegasusEncoder,
    BigBirdPegasusDecoder: SparseBigBirdPegasusDecoder,
    BigBirdPegasusSelfAttention: SparseBigBirdPegasusSelfAttention,
    BigBirdPegasusBlockSparseAttention: SparseBigBirdPegasusSelfAttention,
}

register_family(SparseBigBirdPegasusConfig, POSITIONS, parts=PARTS)
