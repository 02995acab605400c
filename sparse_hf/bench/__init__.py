"""`sparse-hf bench`: is it fast? Peers beside ours in one run, correctness checked before each timing."""

from .attention import run_attention
from .decode import run_decode
from .measure import peak_bytes
from .models import run_models
from .plan import run_plan

__all__ = ["peak_bytes", "run_attention", "run_decode", "run_models", "run_plan"]
