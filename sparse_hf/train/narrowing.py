"""A window that narrows while a model is healed."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback

from ..models import SparseConfigMixin
from ..pattern import Pattern, PerHead, Window


class NarrowingWindow(TrainerCallback):
    """Have each layer see a window beside its pattern while a model trains, and a narrower one later.

    Give it to `heal` or to Trainer among `callbacks`. Between steps the model has its own pattern alone: it is evaluated and saved
    as it will be used.

    Args:
        windows: how many tokens each query sees on each side (decoders: before it), in the order of training.
        steps: training steps over which they are spread evenly; behind them the pattern is alone.

    Raises:
        ValueError: no window, fewer steps than windows, or a window that is wider than the one before.

    Example: `heal(model, rows, args, teacher=dense, callbacks=[NarrowingWindow((2047, 1023), steps=200)])`.

    Examples:
        >>> schedule = NarrowingWindow((2047, 1023), steps=200)
        >>> schedule.window_at(0), schedule.window_at(150), schedule.window_at(200)
        (2047, 1023, None)
    """

    def __init__(self, windows: Sequence[int], steps: int):
        if not windows or list(windows) != sorted(windows, reverse=True) or windows[-1] < 0:
            raise ValueError(f"windows is {list(windows)}; give numbers of tokens that narrow, like (2047, 1023)")
        if steps < len(windows):
            raise ValueError(f"steps is {steps}; each of the {len(windows)} windows needs at least one")
        self.windows, self.steps = tuple(windows), steps
        self._own: dict | None = None

    def window_at(self, step: int) -> int | None:
        """The window of a step, counted from 0; None where the pattern is alone."""
        return self.windows[step * len(self.windows) // self.steps] if step < self.steps else None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not isinstance(getattr(model, "config", None), SparseConfigMixin):
            raise ValueError(
                f"{type(model).__name__} is not sparse; a window narrows to a pattern: call sparsify or convert first"
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        window = self.window_at(state.global_step)
        if window is None or self._own is not None:
            return
        assert model is not None
        self._own = model.config.sparse_attention
        patterns = {name: str(widened(Pattern.parse(text), window)) for name, text in self._own["patterns"].items()}
        model.config.sparse_attention = {**self._own, "patterns": patterns}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._own is not None:
            assert model is not None
            model.config.sparse_attention, self._own = self._own, None


def widened(pattern: Pattern, window: int) -> Pattern:
    """The pattern and a window, in every head."""
    if pattern.heads:
        return PerHead(*(head | Window(window, window) for head in pattern.heads))
    beside = Window(window, window)
    return pattern.widened(beside) if type(pattern) is Window else pattern | beside
