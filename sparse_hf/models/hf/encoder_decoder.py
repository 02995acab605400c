"""What encoder-decoders share: two stacks of layers, a pattern each."""

from __future__ import annotations

from .config import SparseConfigMixin


class SparseEncoderDecoderConfigMixin(SparseConfigMixin):
    """`sparse_attention.layers` is `{"encoder": [...], "decoder": [...]}`; cross-attention stays dense.

    It is linear in the source: every target token reads all of it once.
    """

    @property
    def stacks(self) -> dict[str, int]:
        return {"encoder": self.encoder_layers, "decoder": self.decoder_layers}

    def heads_of(self, stack: str) -> int:
        return self.encoder_attention_heads if stack == "encoder" else self.decoder_attention_heads
