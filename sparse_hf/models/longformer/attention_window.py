"""`attention_window` of a configuration, and the pattern that it means."""

from __future__ import annotations

from typing import Any

from ...pattern import Marked
from ..hf.config import SparseConfigMixin
from ..hf.encoder_decoder import SparseEncoderDecoderConfigMixin


def window_pattern(attention_window: int | list[int], layer: int) -> str:
    """What `attention_window` means: the total width, so each side is half of it; and the global tokens."""
    width = attention_window if isinstance(attention_window, int) else attention_window[layer]
    return f"window({width // 2}, {width // 2}) | {Marked.word}()"


class AttentionWindowConfigMixin(SparseConfigMixin):
    """For configurations with a width for each layer, or one for all."""

    implies_pattern = True
    attention_window: int | list[int]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "attention_window" and isinstance(value, list) and set(value) == {vars(self).get(name)}:
            # Transformers' models write one width as a list when they are made, which says nothing new
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)


class AttentionWindowEncoderConfigMixin(AttentionWindowConfigMixin, SparseEncoderDecoderConfigMixin):
    """The same, of an encoder-decoder's encoder."""
