"""`sparse-hf bench`: is it fast? Peers beside ours in one run, correctness checked before each timing."""

from .attention import run_attention
from .measure import peak_bytes
from .models import run_models

__all__ = ["peak_bytes", "run_attention", "run_models"]
