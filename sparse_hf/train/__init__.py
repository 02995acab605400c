"""Fine-tuning: collators that mark global tokens and pack documents, and healing of converted models.

Imported only when asked: `from sparse_hf.train import MarkHeaders`.
"""

from .collators import MarkHeaders, MarkQuestion, MarkTokens
from .packing import PackDocuments, PackedCollator, first_position

__all__ = ["MarkHeaders", "MarkQuestion", "MarkTokens", "PackDocuments", "PackedCollator", "first_position"]
