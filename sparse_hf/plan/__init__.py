"""Plans: where the work of a pattern is, for these lengths and this batch."""

from .api import build_plan
from .batch import NOTHING, BatchInfo, of_batch
from .block_plan import BlockPlan, MaskFunction, Run
from .cache import made_apart, remembered
from .gathered import Call, Gathered, calls
from .lookup import PlanKey, find_plan, find_strided_plan
from .per_head import joined_rows
from .sequences import make_layout
from .strided import AnyPlan, ByHeads, Regrouped, regrouped, strided_plan
from .window_tables import Split, split

__all__ = [
    "NOTHING",
    "AnyPlan",
    "of_batch",
    "BlockPlan",
    "ByHeads",
    "Call",
    "Gathered",
    "MaskFunction",
    "Regrouped",
    "Run",
    "Split",
    "build_plan",
    "BatchInfo",
    "PlanKey",
    "find_plan",
    "find_strided_plan",
    "calls",
    "joined_rows",
    "made_apart",
    "make_layout",
    "regrouped",
    "remembered",
    "split",
    "strided_plan",
]
