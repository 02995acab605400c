"""`sparse-hf bench`: is it fast? Peers beside ours, correctness checked first.

This is part of the package, and no folder of scripts beside it, because figures are worth most on
the machine that they are asked about: the installed package is all that `sparse-hf bench` needs
there, no checkout. Nothing else of the package imports it but the command line, and `evaluation`
for its figures of cost, and those only when they are asked for.
"""

from .attention import run_attention
from .chosen import SHAPES as CHOSEN_SHAPES
from .chosen import run_chosen
from .generate import Generation, run_generate
from .generate_cases import CASES as GENERATE_CASES
from .generate_cases import SHAPES
from .measure import DTYPES, chosen_device, peak_bytes
from .memory import LongSteps, run_memory
from .models import run_models
from .plan import PATTERNS as PLAN_PATTERNS
from .plan import run_plan
from .results import environment, latest_result, result_path, write_json
from .sequence import SharedTexts, run_sequence

__all__ = [
    "CHOSEN_SHAPES",
    "DTYPES",
    "GENERATE_CASES",
    "PLAN_PATTERNS",
    "SHAPES",
    "Generation",
    "LongSteps",
    "SharedTexts",
    "chosen_device",
    "environment",
    "latest_result",
    "peak_bytes",
    "result_path",
    "run_attention",
    "run_chosen",
    "run_generate",
    "run_memory",
    "run_models",
    "run_plan",
    "run_sequence",
    "write_json",
]
