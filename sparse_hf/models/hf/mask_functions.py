"""Transformers' mask functions, read: what of one is known in another way, and what must be evaluated pair by pair.

A mask function says whether query q may see key k, `(batch, head, q, k) -> bool`, on tensors of indices that broadcast.

Legend: B batch, N tokens, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

SLIDING = "sliding_window_overlay.<locals>.inner_mask"
PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
# those whose pairs are known in another way: documents by number, a sliding window of the family from its pattern
KNOWN = {
    "causal_mask_function",
    "bidirectional_mask_function",
    PACKED,
    SLIDING,
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
}
# from Python 3.11 on
CODE_HAS_NAME = hasattr(causal_mask_function.__code__, "co_qualname")
EITHER = "or_masks.<locals>.or_mask"
COMBINATORS = ("and_masks.<locals>.and_mask", "remap_positions_for_packed_sequence.<locals>.inner_mask")


def read_mask_function(
    mask_function: Callable | None, module_is_causal: bool, own: frozenset[str] = frozenset()
) -> tuple[bool, Callable | None]:
    """Is the mask causal, and what of it must be evaluated pair by pair (None: nothing)?

    Args:
        own: names of further mask functions whose pairs the patterns of the model hold already.
    """
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    if mask_function is None:
        return bool(module_is_causal), None
    if torch.compiler.is_compiling():
        # a graph cannot read closures; the families join functions for packing and for their windows alone
        is_known = name_of(mask_function) in KNOWN or name_of(mask_function) in COMBINATORS
        return bool(module_is_causal), None if is_known else mask_function
    parts = list(leaves(mask_function))
    if all(name_of(part) in KNOWN or name_of(part) in own for part in parts):
        return any(part is causal_mask_function for part in parts), None
    return False, mask_function


def packed_documents(mask_function: Callable | None, rows: int, length: int, device: torch.device) -> Tensor | None:
    """The documents `[B, N]` that Transformers found in positions, None where it looked for none.

    It does so where there is neither a padding mask nor a cache. A document begins where a token must not see the one before.
    """
    if mask_function is None or mask_function in (causal_mask_function, bidirectional_mask_function):
        return None
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and not any(name_of(leaf) == PACKED for leaf in leaves(mask_function)):
        return None
    if is_compiling and name_of(mask_function) not in COMBINATORS:
        return None
    row = torch.arange(rows, device=device)[:, None]
    here = torch.arange(1, length, device=device)[None]
    together = mask_function(row, 0, here, here - 1).expand(rows, length - 1)
    return pad((~together).long().cumsum(1), (1, 0))


def explicit_mask(mask: Tensor, q_offset: int, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask function of a mask `[B or 1, 1, Q, K]` that is given."""
    return mask[b if mask.shape[0] > 1 else torch.zeros_like(b), 0, q - q_offset, k]


# what is added to the score of a pair that may not be seen is at most this
FORBIDDEN = -10_000


def as_allowed(mask: Tensor, queries: int, keys: int) -> Tensor:
    """A mask `[B or 1, 1, Q, K]` that the user made, bool (true: may see) or additive (0: may see), as a bool one.

    Raises:
        ValueError: another shape, or values that change scores.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (queries, keys):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; a 4-D mask must be [batch, 1, {queries}, {keys}]"
        )
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(
            f"a 4-D attention_mask has the dtype {mask.dtype}, of which 0 might say either; pass bool (True: may see), "
            "or floating point (0: may see, -inf: may not)"
        )
    allowed = mask == 0
    # the least of half precision, or what older classes write, behind which no weight is left
    if not (allowed | (mask <= FORBIDDEN)).all():
        raise ValueError(
            "a 4-D attention_mask that adds other values than 0 and -inf is a bias, which is not supported"
        )
    return allowed


def name_of(mask_function: Callable) -> str:
    """The qualified name of a mask function, "" of one that has none."""
    # in a graph, `getattr` with a default gives the default for functions that have closures, and torch 2.11 reads no qualified
    # name but that of the code
    if torch.compiler.is_compiling() and not isinstance(mask_function, partial):
        code: Any = mask_function.__code__
        return code.co_qualname if CODE_HAS_NAME else mask_function.__qualname__
    return getattr(mask_function, "__qualname__", "")


def slides(mask_function: Callable) -> bool:
    """Does a mask function hold a window of the family's own, beside pairs of the tokens of an image perhaps?"""
    return any(name_of(leaf) == SLIDING for leaf in leaves(mask_function, (*COMBINATORS, EITHER)))


def leaves(mask_function: Callable, joined: tuple[str, ...] = COMBINATORS) -> Iterator[Callable]:
    """The mask functions that Transformers joined into this one, by functions of these names."""
    if name_of(mask_function) not in joined:
        yield mask_function
        return
    for cell in mask_function.__closure__ or ():
        inner = cell.cell_contents
        for part in inner if isinstance(inner, tuple) else (inner,):
            if callable(part):
                yield from leaves(part, joined)
