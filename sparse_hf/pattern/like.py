"""What is taken where a pattern is asked for."""

from __future__ import annotations

from .base import Pattern

PatternLike = Pattern | str
