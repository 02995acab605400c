"""Fine-tuning: collators that mark tokens or pack documents, and healing.

Imported only when asked: `from sparse_hf.train import MarkHeaders`.
"""

from .checked import CheckedCollator
from .collators import MarkHeaders, MarkQuestion, Marks, MarkTokens
from .columns import tokens
from .distillation import Distillation, labelled
from .failures import TellAll
from .heal import Healed, HealingTrainer, heal, without_repeated
from .indexer import IndexerTrainer, train_indexer
from .long_text import LongText, long_text
from .lora import add_lora, lora_config
from .narrowing import NarrowingWindow
from .packing import PackDocuments, PackedCollator, first_position
from .plan_memory import MemoryPlan, plan_memory
from .repeatable import RepeatableCollator
from .split_sequence import SplitSequence, split_sequence
from .split_trainer import SplitTrainer, SplitTrainerMixin, without_ring

__all__ = [
    "CheckedCollator",
    "Distillation",
    "Healed",
    "HealingTrainer",
    "IndexerTrainer",
    "LongText",
    "MarkHeaders",
    "MarkQuestion",
    "MarkTokens",
    "Marks",
    "MemoryPlan",
    "NarrowingWindow",
    "PackDocuments",
    "PackedCollator",
    "RepeatableCollator",
    "SplitSequence",
    "SplitTrainer",
    "SplitTrainerMixin",
    "TellAll",
    "add_lora",
    "first_position",
    "heal",
    "labelled",
    "long_text",
    "lora_config",
    "plan_memory",
    "split_sequence",
    "tokens",
    "train_indexer",
    "without_repeated",
    "without_ring",
]
