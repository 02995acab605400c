"""Plans: where the work of a pattern is, for these lengths and this batch."""

from .api import build_plan
from .batch import NOTHING, BatchInfo, of_batch
from .block_plan import BlockPlan, MaskFunction, Run
from .cache import kept, made, made_apart, remembered
from .gathered import Gathered, Stage, stages
from .lookup import PlanKey, find_plan, find_strided_plan
from .most_pairs import most_row_counts
from .per_head import AnyPlan, ByHeads, joined_rows
from .sequences import Sequences, find_sequences
from .strided import Regrouped, regrouped, strided_plan
from .window_tables import Split, split

__all__ = [
    "NOTHING",
    "AnyPlan",
    "BatchInfo",
    "BlockPlan",
    "ByHeads",
    "Gathered",
    "MaskFunction",
    "PlanKey",
    "Regrouped",
    "Run",
    "Sequences",
    "Split",
    "Stage",
    "build_plan",
    "find_plan",
    "find_sequences",
    "find_strided_plan",
    "joined_rows",
    "kept",
    "made",
    "made_apart",
    "most_row_counts",
    "of_batch",
    "regrouped",
    "remembered",
    "split",
    "stages",
    "strided_plan",
]
