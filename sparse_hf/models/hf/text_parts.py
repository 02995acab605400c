"""A text that is split over processes: what layers ask for then, instead of attention over the tokens that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ...attention.backend import AttentionCall

# an argument of forward passes: who computes attention over the text of which this process has a part
TEXT_PART = "text_part"


class TextPart(Protocol):
    """What computes attention of this process's tokens to the whole text."""

    def attention(self, call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
        """Out `[B, H, n, E]` and lse `[B, H, n]` of the tokens of this process."""
        ...

    def marked_rows(self, call: AttentionCall, out: Tensor) -> Tensor | None:
        """`out` `[B, H, n, E]` with the rows of marked tokens by another call; None if none of the text is marked."""
        ...


def check_part(opaque: Callable | None, kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError for what needs the whole text in one process."""
    if opaque is not None:
        raise NotImplementedError(
            "a mask of pairs, or a mask function that sparse_hf does not know, speaks of the whole text, which is split over "
            "processes; pass a 2-D attention mask"
        )
    cache = next(
        (name for name in ("streaming_cache", "page_bounds", "turned_sinks") if kwargs.get(name) is not None), None
    )
    if cache is not None:
        raise NotImplementedError(
            f"{cache} belongs to decoding, which takes a whole model; call remove() of the split first"
        )
