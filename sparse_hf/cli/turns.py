"""Turns of a conversation as tokens: by the tokenizer's chat template, or as plain text."""

from __future__ import annotations

from typing import Any

# what stands in for an answer, whose tokens are the model's own and not written anew
ANSWER = "\u2060the answer\u2060"


class Turns:
    """Token ids of one turn after another, each without what came before it.

    A template is asked for a whole conversation, and may write earlier turns anew. What a cache holds stays as it is, so that of
    the template's text only what stands behind the last answer is taken.

    Args:
        tokenizer: with or without a chat template.
        system: what the template says first; None leaves that to it.

    Raises:
        ValueError: a system text without a template, which alone knows where it stands.
    """

    def __init__(self, tokenizer: Any, system: str | None = None):
        if system is not None and not tokenizer.chat_template:
            raise ValueError(
                "--system needs a tokenizer with a chat template, and this one has none; write it into the first turn"
            )
        self.tokenizer, self.system = tokenizer, system

    @property
    def is_plain(self) -> bool:
        return not self.tokenizer.chat_template

    def ids(self, text: str, is_first: bool) -> list[int]:
        """What is read before the answer to `text`, behind all turns before it."""
        if self.is_plain:
            return self.tokenizer(text, add_special_tokens=is_first)["input_ids"]
        says = {"role": "user", "content": text}
        if is_first:
            start = [] if self.system is None else [{"role": "system", "content": self.system}]
            written = self._written([*start, says])
        else:
            before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": ANSWER}]
            written = self._written([*before, says]).partition(ANSWER)[2]
        return self.tokenizer(written, add_special_tokens=False)["input_ids"]

    def _written(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
