"""How much of dense attention falls on the keys that patterns hold, whatever they choose them by.

Legend: B batch, H query heads, Q queries, K keys; a piece has m queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.backend import AttentionCall
from ...attention.chosen import Limits
from ...attention.composite.content import held_by
from ...attention.dispatch import content_plan
from ...plan import find_plan
from ..hf.chosen_keys import LEARNING, Learning
from .loss import all_that_is_seen, attention_weights, pieces_of_queries


@dataclass
class KeptMass(Learning):
    """Sums over the passes of a model, by the number of the layer: attention to keys that its pattern holds, and to all."""

    needs_gradient = False
    sums: dict[int, Tensor] = field(default_factory=dict)

    @property
    def recalls(self) -> list[float]:
        """The share of attention that each layer keeps, in the order of the layers."""
        return [float(kept / total) for _, (kept, total) in sorted(self.sums.items())]

    @property
    def mean(self) -> float:
        """The mean over layers."""
        return sum(self.recalls) / len(self.recalls)

    def scores(self, indexer: nn.Module, scores: Any, limits: Limits) -> None:
        """Nothing: families that bring indexers of their own are refused."""

    def attention(self, indexer: nn.Module | None, query: Tensor, key: Tensor, scale: float) -> None:
        """Nothing, as above."""

    def layer(self, module: nn.Module, call: AttentionCall) -> None:
        assert call.pattern is not None and not isinstance(call.pattern, str)
        chosen = content_plan(call) if call.pattern.uses_content else None
        positions = find_plan(call.plan_key, call.batch) if chosen is None else chosen.positions
        seen, rows = all_that_is_seen(call, positions), torch.arange(call.q.shape[0], device=call.q.device)
        sums = torch.zeros(2, dtype=torch.float64)
        for some in pieces_of_queries(slice(None), call.q, call.k):
            allowed = seen.seen(some, slice(0, call.k.shape[2]), call.k.device)
            with torch.autocast(call.q.device.type, enabled=False):
                weights = attention_weights(call.q, call.k, allowed, call.scoring.scale, some)
            queries = torch.arange(some.start, some.stop, device=call.q.device)
            if chosen is None:
                keys = torch.arange(call.k.shape[2], device=call.q.device)
                held = positions.allows(rows[:, None, None, None], 0, queries[:, None], keys)
            else:
                held = held_by(chosen, call, queries)
            sums += torch.stack([(weights * held).sum(), weights.sum()]).double().cpu()
        number = vars(module).get("layer_idx") or 0
        self.sums[number] = self.sums.get(number, 0) + sums


@contextmanager
def kept_mass(model: nn.Module) -> Iterator[KeptMass]:
    """Within, passes of a sparse model are asked how much of dense attention each layer's pattern keeps.

    Pass `decode="dense"` to the model to have it asked of the dense model's own attention, and no gradients. It takes time that
    grows with the square of the length, and no such memory.

    Args:
        model: a sparse decoder whose layers share a pattern between their heads.

    Raises:
        ValueError: a model that is not sparse, or of a family that chooses keys by an indexer of its own.

    Examples:
        >>> from sparse_hf import sparsify
        >>> model = sparsify(AutoModelForCausalLM.from_pretrained("my-llama"), "window(31, 0) | first(4) | topk(16)")
        >>> with torch.no_grad(), kept_mass(model) as kept:
        ...     _ = model(torch.randint(3, 97, (1, 200)), decode="dense", use_cache=False)
        >>> 0 < kept.mean < 1
        True
    """
    if getattr(getattr(model, "config", None), "chooses_keys", True):
        raise ValueError(
            f"{type(model).__name__} has no patterns that say which keys are kept; make a dense decoder sparse with sparse_hf.sparsify"
        )
    found = KeptMass()
    token = LEARNING.set(found)
    try:
        yield found
    finally:
        LEARNING.reset(token)
