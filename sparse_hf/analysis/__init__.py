"""What a pattern is, before anything runs: pictures, counts, and how far layers reach."""

from .reach import Reach
from .show import Description, describe, describe_stack, render, render_stack, save_png

__all__ = ["Description", "Reach", "describe", "describe_stack", "render", "render_stack", "save_png"]
