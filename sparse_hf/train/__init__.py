"""Fine-tuning: collators that mark global tokens and pack documents, and healing of converted models.

Imported only when asked: `from sparse_hf.train import MarkHeaders`.
"""

from .checked import CheckedCollator
from .collators import MarkHeaders, MarkQuestion, MarkTokens
from .distillation import Distillation
from .failures import TellAll
from .heal import Healed, HealingTrainer, heal
from .lora import add_lora, lora_config
from .packing import PackDocuments, PackedCollator, first_position
from .repeatable import RepeatableCollator

__all__ = [
    "CheckedCollator",
    "Distillation",
    "Healed",
    "HealingTrainer",
    "MarkHeaders",
    "MarkQuestion",
    "MarkTokens",
    "PackDocuments",
    "PackedCollator",
    "RepeatableCollator",
    "TellAll",
    "add_lora",
    "first_position",
    "heal",
    "lora_config",
]
