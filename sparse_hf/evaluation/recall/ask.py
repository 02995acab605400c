"""Have a decoder answer: greedily, token by token, behind a cache of whole questions.

Legend: B questions that are asked together, n tokens of the longest, A tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..generation import Padding, go_on, prefill
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
    questions: Sequence[Question],
    answering: PreTrainedModel | None = None,
) -> list[tuple[float, float]]:
    """For each question the share of the answers that the model gives, and its mean loss on their tokens, in their order.

    Another model with the same weights may be `answering` behind the prompts that `model` has read.
    """
    prompts = [tokenize(tokenizer, one.prompt) for one in questions]
    answers = [answer_tokens(tokenizer, one) for one in questions]
    ids, wanted = _rows(prompts, model.device, left=True), _rows(answers, model.device, left=False)
    padding, count = _padding(tokenizer, questions, prompts, ids), wanted.shape[1]
    # of each token of the answers, given those before it; the last one predicts none
    if answering is None:
        logits, cache = prefill(model, torch.cat((ids, wanted), 1), padding=_longer(padding, count), last=count + 1)
    else:
        first, cache = prefill(model, ids, padding=padding)
        logits = torch.cat((first, go_on(answering, wanted, cache, _longer(padding, count))), 1)
    logits = logits[:, :-1]  # [B, A, V]
    said = logits.argmax(-1)
    losses = [float(cross_entropy(of_row[: len(one)], torch.tensor(one, device=model.device))) for of_row, one in zip(
        logits, answers, strict=True)]  # fmt: skip
    # up to the first token that is another, the model says the answer itself
    same = [
        int((given[: len(one)].cpu() == torch.tensor(one)).long().cumprod(0).sum())
        for given, one in zip(said, answers, strict=True)
    ]
    others = [b for b, one in enumerate(answers) if same[b] < len(one)]
    if not others:
        return [(1.0, loss) for loss in losses]
    # up to here all of them say their answers
    kept = min(same[b] for b in others)
    cache.crop(kept - count)
    replies = {b: [*answers[b][:kept], int(said[b, kept])] for b in others}
    shares = _greedy(answering or model, tokenizer, questions, replies, (cache, _longer(padding, kept)))
    return [(shares.get(b, 1.0), loss) for b, loss in enumerate(losses)]


def _greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    replies: dict[int, list[int]],
    read: tuple[Cache, Padding | None],
) -> dict[int, float]:
    """Go on with replies by number of question: the share of the answers in each.

    What is `read`, a cache and the padding before its tokens, holds all of a reply but its last token.
    """
    cache, padding = read
    lengths = {b: reply_length(tokenizer, questions[b]) for b in replies}
    shares: dict[int, float] = {}
    while True:
        for b, reply in replies.items():
            if b not in shares:
                share = questions[b].share(str(tokenizer.decode(reply)))
                if share == 1 or len(reply) >= lengths[b] or reply[-1] == tokenizer.eos_token_id:
                    shares[b] = share
        if len(shares) == len(replies):
            return shares
        # rows that have answered go along, and nothing looks at them
        last = torch.tensor([[replies[b][-1] if b in replies else 0] for b in range(len(questions))])
        padding = _longer(padding, 1)
        found = go_on(model, last.to(model.device), cache, padding)[:, -1].argmax(-1).tolist()
        for b, reply in replies.items():
            if b not in shares:
                reply.append(found[b])


def _rows(ids: Sequence[list[int]], device: torch.device, left: bool) -> Tensor:
    """Tokens as rows `[B, n]`, padded on one side."""
    longest = max(map(len, ids))
    pads = [[0] * (longest - len(one)) for one in ids]
    return torch.tensor([pad + one if left else one + pad for pad, one in zip(pads, ids, strict=True)], device=device)


def _padding(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], prompts: Sequence[list[int]], ids: Tensor
) -> Padding | None:
    """The padding before prompts; a single one has none."""
    if len(prompts) == 1:
        return None
    lengths = torch.tensor([[len(one)] for one in prompts], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - lengths).long()
    replies = (max(reply_length(tokenizer, one), len(answer_tokens(tokenizer, one))) for one in questions)
    return Padding(mask, max(len(prompt) + reply for prompt, reply in zip(prompts, replies, strict=True)))


def _longer(padding: Padding | None, count: int) -> Padding | None:
    return None if padding is None else padding.longer(count)
