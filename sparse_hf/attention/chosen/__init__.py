"""Attention over keys that are chosen for each query at run time: which ones (`choose`), and what they add up to."""

from .api import attend_chosen
from .best_keys import Limits, Scorer, choose
from .latent import Latents, attend_latent
from .scores import DotScores, IndexerScores

__all__ = ["DotScores", "IndexerScores", "Latents", "Limits", "Scorer", "attend_chosen", "attend_latent", "choose"]
