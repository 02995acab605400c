"""`attention_window` of a configuration, and the pattern that it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        if name == "attention_window" and isinstance(value, list) and value == [vars(self).get(name)] * len(value):
            # Transformers' models write one width as a list when they are made, which says nothing new
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As of any sparse configuration; fewer layers that are asked for leave as many widths."""
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        vars(config)["attention_window"] = config._fitted_widths({})
        return made

    @contextmanager
    def saved_as(self, numbers: Mapping[str, Sequence[int]] | None = None) -> Iterator[None]:
        """As of any sparse configuration; a list of widths has one for each layer that is saved."""
        widths = self.attention_window
        vars(self)["attention_window"] = self._fitted_widths(numbers or {})
        try:
            with super().saved_as(numbers):
                yield
        finally:
            vars(self)["attention_window"] = widths

    def _fitted_widths(self, numbers: Mapping[str, Sequence[int]]) -> int | list[int]:
        """The widths of the layers that there are, where some were dropped or repeated: Transformers' models count them."""
        stack, count = next(iter(self.stacks.items()))
        widths, of_layers = self.attention_window, numbers.get(stack, range(count))
        if isinstance(widths, int) or len(widths) == count == len(of_layers):
            return widths
        return [widths[min(number, len(widths) - 1)] for number in of_layers]


class AttentionWindowEncoderConfigMixin(AttentionWindowConfigMixin, SparseEncoderDecoderConfigMixin):
    """The same, of an encoder-decoder's encoder."""
