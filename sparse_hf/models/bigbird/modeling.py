"""sparse_big_bird: BigBird (arXiv:2007.14062) through our plans, an encoder or a causal decoder, at any length.

Without `sparse_attention` in the configuration, `attention_type`, `block_size` and `num_random_blocks` say what it is.
"""

from functools import wraps
from typing import Any

from transformers import BigBirdConfig, BigBirdModel
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdSelfAttention

from ..hf.model_mixin import SparseMixin
from ..hf.positions import Positions
from ..hf.register import register_family
from .block_sparse import PATH, BlockSparseAttentionMixin, BlockSparseConfigMixin, implied_text, refuse_attention_type


class SparseBigBirdConfig(BlockSparseConfigMixin, BigBirdConfig):
    model_type = "sparse_big_bird"

    def implied_pattern(self, stack: str, layer: int) -> str:
        return implied_text(self, layer)

    def layer_pattern(self, layer: int | None, is_causal: bool = False, stack: str = "") -> str:
        return super().layer_pattern(layer, is_causal or self.is_decoder, stack)


class SparseBigBirdSelfAttention(BlockSparseAttentionMixin, BigBirdSelfAttention):
    """Self-attention by the pattern; attention to an encoder's states stays dense."""


class OwnPathMixin(SparseMixin):
    """Hands on to the attention what `BigBirdModel` keeps to itself, and keeps to the one path through its code."""

    encoder: Any
    attention_type: str

    @wraps(BigBirdModel.forward)
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, **kwargs):
        kwargs |= {"token_positions": position_ids, "padding_mask": attention_mask, "is_whole": attention_mask is None}
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)

    def number_layers(self) -> None:
        self.attention_type = PATH
        for number, layer in enumerate(self.encoder.layer):
            for name in ("attention", "crossattention"):
                attention = getattr(layer, name, None)
                if attention is not None:
                    attention.attention_type = PATH
                    attention.self.config, attention.self.layer_idx = self.config, number
                    attention.self.reads_encoder = name == "crossattention"

    def set_attention_type(self, value: str) -> None:
        # the parent calls it while it is built, if it will read an encoder
        if self.attention_type == PATH:
            refuse_attention_type(value)


class SparseBigBirdModel(OwnPathMixin, BigBirdModel):
    config: SparseBigBirdConfig


POSITIONS = Positions(
    "learned", ("embeddings.position_embeddings.weight",), ("embeddings.position_ids", "embeddings.token_type_ids")
)
PARTS = {
    BigBirdSelfAttention: SparseBigBirdSelfAttention,
    BigBirdBlockSparseAttention: SparseBigBirdSelfAttention,
}

register_family(SparseBigBirdConfig, POSITIONS, parts=PARTS)
