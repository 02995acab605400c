"""Plans: where the work of a pattern is, for these lengths and this batch."""

from .api import build_plan
from .block_plan import BlockPlan, MaskFunction, Run
from .cache import made_apart, remembered
from .gathered import Call, Gathered, calls
from .lookup import cached_plan
from .per_head import joined_rows
from .sequences import make_layout
from .strided import AnyPlan, ByHeads, Regrouped, regrouped, strided_plan
from .window_tables import Split, split

__all__ = [
    "AnyPlan",
    "BlockPlan",
    "ByHeads",
    "Call",
    "Gathered",
    "MaskFunction",
    "Regrouped",
    "Run",
    "Split",
    "build_plan",
    "cached_plan",
    "calls",
    "joined_rows",
    "made_apart",
    "make_layout",
    "regrouped",
    "remembered",
    "split",
    "strided_plan",
]
