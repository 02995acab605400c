"""What encoder-decoders share: two stacks of layers, a pattern each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import SparseConfigMixin

# a mixin stands before a dense configuration, whose fields a type checker finds here
if TYPE_CHECKING:

    class _Config(SparseConfigMixin):
        encoder_layers: int = 0
        decoder_layers: int = 0
        encoder_attention_heads: int = 0
        decoder_attention_heads: int = 0
else:
    _Config = SparseConfigMixin


class SparseEncoderDecoderConfigMixin(_Config):
    """`sparse_attention.layers` is `{"encoder": [...], "decoder": [...]}`; cross-attention stays dense.

    It is linear in the source: every target token reads all of it once.
    """

    @property
    def stacks(self) -> dict[str, int]:
        return {"encoder": self.encoder_layers, "decoder": self.decoder_layers}

    def heads_of(self, stack: str) -> int:
        return self.encoder_attention_heads if stack == "encoder" else self.decoder_attention_heads
