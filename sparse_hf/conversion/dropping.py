"""What `export` leaves out of patterns that have no native form, and what that costs."""

from __future__ import annotations

from functools import reduce
from operator import and_, or_
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from .. import models
from ..pattern import Pattern
from ..pattern.base import Intersection, Union
from ..plan import build_plan
from .carry import read_json

# tokens at which pairs are counted, and that are read of a text: logits of more would take gigabytes
COUNTED, READ = 4096, 2048


def without(pattern: Pattern, dropped: Pattern | None) -> Pattern:
    """A union without one of its parts, also where it is cut by a window; any other pattern stays."""
    if isinstance(pattern, Union) and dropped in pattern.parts:
        return reduce(or_, [part for part in pattern.parts if part != dropped])
    if isinstance(pattern, Intersection):
        return reduce(and_, [without(part, dropped) for part in pattern.parts])
    return pattern


def share_of_pairs(before: Pattern, after: Pattern) -> float:
    """The share of a layer's pairs that is dropped, at `COUNTED` tokens."""
    densities = [build_plan(str(pattern), COUNTED, COUNTED).density for pattern in (before, after)]
    return 1 - densities[1] / densities[0]


def measured_cost(sparse: Path, exported: Path, text: Path) -> str:
    """How a text is read by the sparse checkpoint and by the one without what was dropped, as a sentence.

    Language models that see the past are compared by their perplexity, others by the cosine of their states.

    Raises:
        FileNotFoundError: no text.
        ValueError: a folder without a tokenizer.
    """
    ids = _tokens(sparse, text)
    about = f"{ids.shape[1]:,} tokens of {text.name}"
    if _class(sparse).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        before, after = (_perplexity(_load(folder), ids) for folder in (sparse, exported))
        return f"perplexity on {about}: {before:.4g} with what is dropped, {after:.4g} without"
    before, after = (_states(_load(folder), ids) for folder in (sparse, exported))
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    return f"states of {about} with what is dropped and without: cosine {float(cosine):.4f} in the mean"


def _tokens(folder: Path, text: Path) -> Tensor:
    if not text.is_file():
        raise FileNotFoundError(f"{text} is no file; give a text on which to measure what dropping costs")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no tokenizer that could read {text}; leave the text out") from error
    limit = read_json(folder / "config.json").get("max_position_embeddings") or READ
    given = tokenizer(
        text.read_text(encoding="utf-8"), return_tensors="pt", truncation=True, max_length=min(READ, limit)
    )
    return given["input_ids"]


def _class(folder: Path) -> Any:
    """The class of a checkpoint, ours or Transformers'."""
    name = read_json(folder / "config.json")["architectures"][0]
    return getattr(models if name.startswith("Sparse") else transformers, name)


def _load(folder: Path) -> PreTrainedModel:
    return _class(folder).from_pretrained(folder).eval()


@torch.inference_mode()
def _perplexity(model: Any, ids: Tensor) -> float:
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss.exp())


@torch.inference_mode()
def _states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    base: Any = model.base_model
    return base(input_ids=ids).last_hidden_state[0].float()
