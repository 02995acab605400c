"""What the layers of a sparse model cannot hear, said where a pattern is chosen: from its windows alone, without a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from ...pattern import Pattern
from ...pattern.forms import ANY_LENGTH, WindowForm, read_window
from .config import SparseConfigMixin, past
from .counterparts import COUNTERPARTS


@dataclass(frozen=True)
class Hearing:
    """From how far a token hears through all layers, to the left and to the right; None: as far as there is anything."""

    left: int | None
    right: int | None

    def is_short_of(self, length: int) -> bool:
        """Are there texts of so many tokens of which some token does not hear all that it may?"""
        return any(side is not None and side < length - 1 for side in (self.left, self.right))


def is_causal(model: nn.Module) -> bool:
    """Does a model, dense or sparse, see its past only? Of an encoder-decoder, the decoder does.

    Not all dense classes of decoders say so, and their counterparts do.
    """
    kinds = (COUNTERPARTS.get(type(module)) for module in model.modules())
    return any(getattr(one, "is_causal", False) is True for one in (*model.modules(), *kinds))


def hearing(config: SparseConfigMixin, is_causal: bool, stack: str = "") -> Hearing | None:
    """What a stack of layers hears; None where a pattern is more than a window with global tokens, so that it is not known.

    Windows of layers add up. Global tokens carry anything anywhere, but for the first ones of a causal model, which see
    nothing behind themselves.

    Example: 4 layers of `window(63, 0) | first(4)` in a decoder hear 252 tokens back.
    """
    # there is nothing to the right that a causal model could hear
    left, right = 0, None if is_causal else 0
    for layer in range(config.stacks[stack]):
        form = _form(config, layer, is_causal, stack)
        if form is None:
            return None
        if form.marked or form.first and not is_causal:
            return Hearing(None, None)
        if form.window is None:
            continue
        left = None if left is None or form.window.left is None else left + form.window.left
        right = None if right is None or form.window.right is None else right + form.window.right
    return Hearing(left, right)


def hearing_warnings(
    config: SparseConfigMixin, causal_model: bool, length: int | None, stacks: Iterable[str] | None = None
) -> list[str]:
    """What to say of a pattern for texts of `length` tokens, one sentence each: what is not heard, and that nothing is global.

    Layers that have what their family implies, a sliding window of its own for instance, are as they were trained.

    Args:
        stacks: those that there are; by default all of the configuration.
    """
    return [
        text
        for stack in (config.stacks if stacks is None else stacks)
        for text in _of_stack(config, stack == "decoder" if stack else causal_model, length, stack)
    ]


def _of_stack(config: SparseConfigMixin, is_causal: bool, length: int | None, stack: str) -> Iterator[str]:
    count = config.stacks[stack]
    changed = [layer for layer in range(count) if _is_changed(config, layer, is_causal, stack)]
    if not changed or length is None:
        return
    found, where = hearing(config, is_causal, stack), f"the {stack}'s" if stack else "the model's"
    if found is not None and found.is_short_of(length):
        side = f"{found.left:,} tokens back" if is_causal else f"{max(found.left or 0, found.right or 0):,} tokens away"
        remedy = _dense_ones(config, count) if is_causal else "`| first(1)` or `| marked()`"
        reach = f", or let some layers or tokens reach all ({remedy})" if remedy else ""
        yield (
            f"through {where} {count} layers a token hears at most {side}, and texts may have {length:,}: what stands farther cannot "
            f"change an answer, whatever is trained; widen the windows{reach}"
        )
    forms = [_form(config, layer, is_causal, stack) for layer in changed]
    bare = [f for f in forms if f is not None and _is_short(f, length) and not f.first and not f.marked]
    if is_causal and bare:
        yield (
            f"nothing is global in {len(bare)} of {where} {count} layers: dense models put weight that they have no use for on the first "
            "tokens, and answer badly once these are out of sight; add `| first(4)`"
        )


def _dense_ones(config: SparseConfigMixin, count: int) -> str:
    """What `layers` may say to let some reach all; "" where every layer of the dense family slides.

    A layer that slides in the dense family was never trained to see more, and answers badly if it does.
    """
    whole = [layer for layer in range(count) if config.own_window(layer) is None]
    if len(whole) == count:
        return "`sparse-hf tune` chooses layers"
    named = ", ".join(f"{layer}=dense" for layer in whole)
    return f"layers='{named}'" if whole else ""


def _is_short(form: WindowForm, length: int) -> bool:
    return form.window is not None and form.window.left is not None and form.window.left < length - 1


def _is_changed(config: SparseConfigMixin, layer: int, is_causal: bool, stack: str) -> bool:
    """Has a layer another pattern than its family implies?"""
    implied, text = config.implied_pattern(stack, layer), config.layer_pattern(layer, is_causal, stack)
    implied = past(implied) if is_causal else implied
    own, given = _read(implied), _read(text)
    return text != implied if own is None or given is None else own != given


def _form(config: SparseConfigMixin, layer: int, is_causal: bool, stack: str) -> WindowForm | None:
    return _read(config.layer_pattern(layer, is_causal, stack))


def _read(text: str) -> WindowForm | None:
    """A pattern as a window with global tokens, None where it is more."""
    pattern = Pattern.parse(text)
    if pattern.heads or pattern.uses_content:
        return None
    form = read_window(pattern, ANY_LENGTH, of_any_reach=True)
    return form if isinstance(form, WindowForm) else None
