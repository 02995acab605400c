"""sparse_modernbert: ModernBERT (arXiv:2412.13663) with sparse attention."""

from transformers import ModernBertConfig

from ..pattern import Window
from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseModernBertConfig(SparseConfigMixin, ModernBertConfig):
    model_type = "sparse_modernbert"

    def own_window(self, layer: int) -> Window | None:
        # `local_attention` is the whole width without the query itself, half of it on each side
        half = self.local_attention // 2
        assert self.layer_types is not None
        return Window(half, half) if self.layer_types[layer] == "sliding_attention" else None


register_family(SparseModernBertConfig, ROTARY)
