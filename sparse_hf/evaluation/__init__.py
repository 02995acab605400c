"""What a model loses by a pattern, measured before it is converted."""

from .api import evaluate
from .budget import Budget
from .candidates import Candidate
from .evaluation import Evaluation
from .settings import Settings
from .tune import Tuning, tune

__all__ = ["Budget", "Candidate", "Evaluation", "Settings", "Tuning", "evaluate", "tune"]
