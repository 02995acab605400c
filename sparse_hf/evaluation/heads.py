"""Which heads fetch what an answer copies: attention to the copied token, where a pattern would cut it off.

Legend: P tokens of a prompt, A tokens of an answer, n = P + A, H query heads, G key heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.hf.config import SparseConfigMixin
from ..plan import build_plan
from .mass import Scores, attention_weights
from .observe import layer_of, observed
from .recall.ask import answer_tokens
from .recall.tasks import Question
from .subject import Subject
from .texts import tokenize


@torch.inference_mode()
def copied_attention(subject: Subject, patterns: list[str], question: Question) -> dict[int, list[float]]:
    """The weight that each group of heads puts on the tokens that the answer copies, by layer: `[G]` each.

    Weights are means over the tokens of the answer and over the heads of a group. Of a token's copies in the prompt, those count
    that a layer's entry of `patterns` would cut off.
    """
    prompt, answer = tokenize(subject.tokenizer, question.prompt), answer_tokens(subject.tokenizer, question)
    ids = torch.tensor([[*prompt, *answer]], device=subject.device)
    copied, found = copies(prompt, answer).to(subject.device), {}
    first, last = len(prompt) - 1, ids.shape[1] - 1
    own, tokens = subject.dense.layer_patterns(True), ids.shape[1]
    plans = {text: build_plan(text, tokens, tokens, device=subject.device) for text in {*patterns, *own}}

    def see(module: Any, q: Tensor, k: Tensor, arguments: dict[str, Any]) -> None:
        layer = layer_of(module, len(found))
        heads, groups = q.shape[1], k.shape[1]
        rows, keys = (first, last), (0, last)
        seen = plans[own[layer]].mask(0, 0, rows, keys)
        plan = plans[patterns[layer]]
        kept = torch.stack([plan.mask(0, p, rows, keys) for p in plan.heads or (0,)])
        weights, _ = attention_weights(
            q[0, :, first:last], k[0, :, :last].repeat_interleave(heads // groups, 0), Scores.of(q, arguments), seen
        )
        far = weights * (copied & ~kept)
        found[layer] = far.sum(-1).mean(-1).view(groups, -1).mean(-1).tolist()

    with observed(subject.dense.model, see):
        subject.dense.model.base_model(input_ids=ids, use_cache=False)
    return found


def copies(prompt: list[int], answer: list[int]) -> Tensor:
    """For each token of the answer, where it stands in the text before it behind the same token: `[A, P + A - 1]`.

    The first token of the answer may stand anywhere.
    """
    text = torch.tensor([*prompt, *answer])
    found = text[None, :-1] == torch.tensor(answer)[:, None]
    found[1:, 1:] &= text[None, :-2] == torch.tensor(answer)[:-1, None]
    found[1:, 0] = False
    # what is copied stands in the prompt
    found[:, len(prompt) :] = False
    return found


def groups_of(config: SparseConfigMixin) -> int:
    """How many groups of heads share keys."""
    text: Any = config.get_text_config()
    return getattr(text, "num_key_value_heads", None) or config.heads_of("")
