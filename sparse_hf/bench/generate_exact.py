"""Are tokens that `generate` gives those of the pattern? Their logits beside a dense model's with the pattern as its mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..pattern import Pattern
from ..pattern.base import Marks
from .generate_cases import Case, Models
from .measure import DTYPES
from .models import ERROR_FACTOR, EXACT_ERROR
from .results import Row

# tokens of the prompt: the first of these at which the pattern lacks a pair
COMPARED_LENGTHS = (320, 1280, 2560, 5120)
# new tokens, one by one behind the cache, the first of which are computed before a graph is replayed
COMPARED_STEPS = 6

# gives the new tokens `[B, S]` of a case behind a prompt, and the logits `[B, S, V]` that they were chosen by
Generate = Callable[[Case, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Prompt:
    """Token ids `[B, n]`, and a mask `[1, H or 1, n + S - 1, n + S - 1]` of the pattern's pairs with those that follow."""

    ids: Tensor
    mask: Tensor


def make_prompt(models: Models, rows: int) -> Prompt:
    """The shortest prompt at whose end the pattern lacks a pair."""
    # what is last in a text is nothing in a decoder: the configuration knows what a pattern means there
    text = models.ours.config.layer_pattern(0, is_causal=True)
    device = models.dense.device
    n, mask = 0, torch.empty(0)
    for n in COMPARED_LENGTHS:
        mask = _mask(text, n + COMPARED_STEPS - 1, device)
        if not mask[..., n - 1, :n].all():
            break
    return Prompt(models.prompt(rows, n), mask)


def _mask(text: str, n: int, device: torch.device) -> Tensor:
    """`[1, H or 1, n, n]` bool."""
    pattern, at = Pattern.parse(text).on(device), torch.arange(n, device=device)
    each = [p.allows(at[:, None], at[None, :], Marks(length=n)).expand(n, n) for p in pattern.heads or (pattern,)]
    return torch.stack(each)[None]


@torch.no_grad()
def compare(
    models: Models, prompt: Prompt, generated: dict[str, tuple[Case, Tensor, Tensor]], dtype: str
) -> dict[str, Row]:
    """Relative errors of the logits of each case, and what is right.

    A case is right where it is at most `ERROR_FACTOR` times as far from the dense model in float32, given the pattern as its mask
    and the same tokens, as that model is itself in `dtype`.

    Args:
        generated: by key, the case, its new tokens and their logits.
    """
    texts: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    for case, tokens, _ in generated.values():
        given = {"attention_mask": prompt.mask} if case.kind == "ours" else {}
        texts[_key(case, tokens)] = torch.cat((prompt.ids[: len(tokens)], tokens[:, :-1]), 1), given
    stock = {key: _logits(models.dense, *text).float() for key, text in texts.items()}
    models.cast(torch.float32)
    right = {key: _logits(models.dense, *text) for key, text in texts.items()}
    models.cast(DTYPES[dtype])
    found: dict[str, Row] = {}
    for name, (case, tokens, logits) in generated.items():
        key = _key(case, tokens)
        error, dense_error = _error(logits, right[key]), _error(stock[key], right[key])
        bound = max(ERROR_FACTOR * dense_error, EXACT_ERROR)
        found[name] = {"tokens": prompt.ids.shape[1], "error": error, "dense_error": dense_error, "bound": bound}
        # NaN is no more than any bound, and no less
        if not error <= bound:
            found[name]["failed"] = f"wrong: logits are off by {error:.1e}; {bound:.1e} is right"
    return found


def _key(case: Case, tokens: Tensor) -> tuple:
    return case.kind, *tokens.flatten().tolist()


def _logits(model: PreTrainedModel, ids: Tensor, given: dict[str, Any]) -> Tensor:
    return model(input_ids=ids, use_cache=False, logits_to_keep=COMPARED_STEPS, **given).logits


def _error(got: Tensor, right: Tensor) -> float:
    return float((got.float() - right.float()).norm() / right.float().norm())
