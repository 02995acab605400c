"""Have a decoder answer: greedily, token by token, behind a cache of the whole question."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..generation import go_on, prefill
from ..texts import tokenize
from .tasks import Question

# tokens beyond those of the answer, for words that join several
SPARE = 6


def reply_length(tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    """How many tokens a model may take to answer."""
    return question.reply or len(answer_tokens(tokenizer, question)) + SPARE


def answer_tokens(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """The answers as they stand behind the question."""
    return tokenize(tokenizer, question.wanted, special=False)


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    answering: PreTrainedModel | None = None,
) -> tuple[float, float]:
    """The share of the answers that the model gives, and its mean loss on their tokens, in the order of the question.

    Another model with the same weights may be `answering` behind the prompt that `model` has read.
    """
    answering = answering or model
    ids = torch.tensor([tokenize(tokenizer, question.prompt)], device=model.device)
    wanted = torch.tensor([answer_tokens(tokenizer, question)], device=model.device)
    first, cache = prefill(model, ids)
    # of each token of the answer, given those before it; the last one predicts none
    logits = torch.cat((first, go_on(answering, wanted, cache)[:, :-1]), 1)[0]
    loss = float(cross_entropy(logits, wanted[0]))
    said = logits.argmax(-1)
    # up to the first token that is another, the model says the answer itself
    same = int((said == wanted[0]).long().cumprod(0).sum())
    if same == wanted.shape[1]:
        return 1.0, loss
    cache.crop(same - wanted.shape[1])
    reply = [*wanted[0, :same].tolist(), int(said[same])]
    return _greedy(answering, cache, tokenizer, question, reply, reply_length(tokenizer, question)), loss


def _greedy(
    model: PreTrainedModel,
    cache: Cache,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    reply: list[int],
    count: int,
) -> float:
    """Go on with a reply whose last token the cache has not seen, up to `count` tokens: the share of the answers in it."""
    while (
        (share := question.share(str(tokenizer.decode(reply)))) < 1
        and len(reply) < count
        and reply[-1] != tokenizer.eos_token_id
    ):
        reply.append(int(go_on(model, torch.tensor([reply[-1:]], device=model.device), cache)[0, -1].argmax()))
    return share
