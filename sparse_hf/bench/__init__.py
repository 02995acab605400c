"""`sparse-hf bench`: is it fast? Peers beside ours in one run, correctness checked before each timing."""

from .attention import run_attention
from .measure import peak_bytes

__all__ = ["peak_bytes", "run_attention"]
