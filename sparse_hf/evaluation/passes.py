"""Forward passes that several probes share: states of a text, and answers made of them a few tokens at a time.

Legend: n tokens, D hidden size, V vocabulary, S tokens whose states are compared layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

# numbers of a chunk of logits, 64 MiB in float32; a GPU waits for its host between chunks, and takes 512 MiB
MAX_LOGITS, MAX_GPU_LOGITS = 1 << 24, 1 << 27
# tokens whose states are compared layer by layer
MAX_COMPARED = 512


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model makes of a text: `last` states `[n, D]`, and of each layer those of some tokens, `[S, D]`."""

    last: Tensor
    layers: tuple[Tensor, ...]


@torch.inference_mode()
def read(model: PreTrainedModel, ids: Tensor) -> Reading:
    """The states of the text `ids` `[1, n]`, without a head."""
    options = {"use_cache": False} if model.can_generate() else {}
    output = model.base_model(input_ids=ids.to(model.device), output_hidden_states=True, **options)
    some = compared_tokens(ids.shape[1]).to(model.device)
    return Reading(output.last_hidden_state[0], tuple(state[0, some].float().cpu() for state in output.hidden_states))


def compared_tokens(length: int) -> Tensor:
    """The tokens whose states are compared layer by layer, evenly spaced, the last among them."""
    return torch.linspace(0, length - 1, min(length, MAX_COMPARED)).round().long()


@torch.inference_mode()
def answers(model: PreTrainedModel, states: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The logits `[c, V]` of states `[n, D]` in chunks of c tokens, each with the number of its first token.

    The model's own head makes them, whatever it does to states and logits: the model reads a single token, in place of whose
    states it is given those of a chunk.
    """
    most = MAX_GPU_LOGITS if model.device.type == "cuda" else MAX_LOGITS
    chunk = max(1, most // model.config.get_text_config().vocab_size)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    options = {"use_cache": False} if model.can_generate() else {}
    for start in range(0, len(states), chunk):
        with _given(model, states[start : start + chunk]):
            output = model(input_ids=token, **options)
        # heads that were trained beside another task name them so
        yield start, (output["logits"] if "logits" in output else output["prediction_logits"])[0].float()


@torch.inference_mode()
def losses(model: PreTrainedModel, states: Tensor, ids: Tensor) -> Tensor:
    """The loss of each token of `ids` `[n]` but the first, from the states `[n, D]` of those before it: `[n - 1]`."""
    found = []
    for start, logits in answers(model, states[:-1]):
        wanted = ids[start + 1 : start + 1 + len(logits)].to(logits.device)
        found.append(cross_entropy(logits, wanted, reduction="none").double().cpu())
    return torch.cat(found)


@contextmanager
def _given(model: PreTrainedModel, states: Tensor) -> Iterator[None]:
    """Have the head of a model be given these states `[c, D]`, whatever is below it."""
    calls = []

    def give(_module, _arguments, output):
        calls.append(output)
        output["last_hidden_state"] = states[None]
        return output

    # some heads pass the base model by and ask the decoder within
    bodies = {id(body): body for body in (model.base_model, model.get_decoder()) if isinstance(body, PreTrainedModel)}
    hooks = [body.register_forward_hook(give) for body in bodies.values() if body is not model]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise NotImplementedError(
            f"the head of {type(model).__name__} asks another model than its base model for states"
        )


class Passes:
    """The last readings, so that probes that look at the same text share them."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._dense: Reading | None = None
        self._other: tuple[str, Reading] | None = None

    def dense(self, model: PreTrainedModel, text: str, ids: Tensor) -> Reading:
        """The dense model's reading, which is kept until another text is read."""
        if text != self._text or self._dense is None:
            self._text, self._other = text, None
            self._dense = read(model, ids)
        return self._dense

    def other(self, name: str, model: PreTrainedModel, text: str, ids: Tensor) -> Reading:
        """A candidate's reading, which is kept until another's."""
        key = f"{name}\n{text}"
        if self._other is None or self._other[0] != key:
            # the last one's memory is free before the next is made
            self._other = None
            self._other = key, read(model, ids)
        return self._other[1]

    def forget(self) -> None:
        """Free the memory of the last readings."""
        self._text = self._dense = self._other = None
