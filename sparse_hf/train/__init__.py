"""Fine-tuning: collators that mark global tokens and pack documents, and healing of converted models.

Imported only when asked: `from sparse_hf.train import MarkHeaders`.
"""

from .collators import MarkHeaders, MarkQuestion, MarkTokens
from .heal import Distillation, Healed, HealingTrainer, heal, lora_config
from .packing import PackDocuments, PackedCollator, first_position

__all__ = [
    "Distillation",
    "Healed",
    "HealingTrainer",
    "MarkHeaders",
    "MarkQuestion",
    "MarkTokens",
    "PackDocuments",
    "PackedCollator",
    "first_position",
    "heal",
    "lora_config",
]
