"""Attention over keys that are chosen for each query at run time: which ones (`choose`), and what they add up to."""

from .api import attend_chosen
from .best_keys import Limits, Scorer, choose
from .scores import DotScores, IndexerScores

__all__ = ["DotScores", "IndexerScores", "Limits", "Scorer", "attend_chosen", "choose"]
