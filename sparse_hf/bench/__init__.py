"""`sparse-hf bench`: is it fast? Peers beside ours in one run, correctness checked before each timing."""

from .attention import run_attention

__all__ = ["run_attention"]
