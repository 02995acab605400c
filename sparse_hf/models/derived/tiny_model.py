"""A tiny dense model with random weights, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .samples import sample_inputs
from .tiny_config import SMALLEST, Sizes, head_dim_of, tiny_config

MOST_NUMBERS = 40_000_000
# what fails while a class is tried that nobody has tried before
FAILURES = (
    RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError, NotImplementedError,
    ArithmeticError, ImportError, NameError, OSError, StrictDataclassError,
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Have Transformers say nothing of what it minds in a tiny configuration, which nobody wrote."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def apart() -> Iterator[None]:
    """Leave the random generator and torch's defaults as they are outside."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), quiet():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def tiny_with_inputs(
    dense_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[PreTrainedModel, dict[str, Any], Any]:
    """A tiny model, arguments that it takes, and its answer. Some classes have sizes of their own for the dims of a head."""
    problem: Exception | None = None
    for sizes in dict.fromkeys((SMALLEST, Sizes(min(head_dim_of(config) or 128, 256)))):
        try:
            dense = tiny_model(dense_class, config, sizes)
            return dense, *sample_inputs(dense)
        except FAILURES as error:
            problem = problem or error
    assert problem is not None
    raise problem


def tiny_model(
    dense_class: type[PreTrainedModel], config: PreTrainedConfig, sizes: Sizes = SMALLEST
) -> PreTrainedModel:
    """A tiny dense model with random weights, in float32 on the CPU.

    Raises:
        ValueError: one that is not tiny.
    """
    tiny: Any = tiny_config(config, sizes)
    tiny._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(p.numel() for p in dense_class(tiny).parameters())
    if count > MOST_NUMBERS:
        raise ValueError(f"it has {count:,} weights, of sizes that are not known by their names")
    model = dense_class(tiny)
    model.float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                # attention is far from uniform then, and answers stay near 1
                weight.normal_(0, max(1, weight[0].numel()) ** -0.5)
    return model
