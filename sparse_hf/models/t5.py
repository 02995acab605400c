"""sparse_t5: T5 (arXiv:1910.10683) with sparse self-attention in encoder and decoder.

T5 adds to every score a learned bias that depends on the distance alone. Stock attention makes it a tensor with two
length dimensions; here it is one vector of distances per head, which every backend reads.
"""

from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from .distances import distances_of
from .hf.encoder_decoder import SparseEncoderDecoderConfigMixin
from .hf.model_mixin import SparseEncoderMixin
from .hf.positions import Positions
from .hf.register import register_family


class SparseT5Config(SparseEncoderDecoderConfigMixin, T5Config):
    model_type = "sparse_t5"

    @property
    def stacks(self) -> dict[str, int]:
        assert self.num_decoder_layers is not None
        return {"encoder": self.num_layers, "decoder": self.num_decoder_layers}

    def heads_of(self, stack: str) -> int:
        return self.num_heads


class SparseT5Attention(T5Attention):
    """T5's attention whose bias is linear in the length."""

    def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
        """The bias `[num_heads, distances]`, see `distances`."""
        distances = distances_of(query_length, key_length, past_seen_tokens, device)
        buckets = self._relative_position_bucket(
            distances,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        return self.relative_attention_bias(buckets).T

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, *args, **kwargs):
        if position_bias is None and not self.has_relative_attention_bias:
            # cross-attention has none, and the parent would make `[1, heads, queries, keys]` of zeros
            position_bias = hidden_states.new_zeros(0)
        return super().forward(hidden_states, mask, key_value_states, position_bias, *args, **kwargs)


class SparseT5Stack(SparseEncoderMixin, T5Stack):
    config: SparseT5Config


register_family(SparseT5Config, Positions("relative"), parts={T5Attention: SparseT5Attention, T5Stack: SparseT5Stack})
