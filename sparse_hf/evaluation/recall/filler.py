"""Text in which facts are hidden: sentences of the user's own texts, with their numbers of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..texts import Text, tokenize

# characters of each text that are read, far more than any question takes
MAX_CHARACTERS = 4_000_000
# characters beyond which a sentence is cut
LONGEST = 400
END = re.compile(r"(?<=[.!?;:])\s+|\n\s*\n")


@dataclass(frozen=True, eq=False)
class Filler:
    """Sentences with their numbers of tokens, in the order of the texts."""

    tokenizer: PreTrainedTokenizerBase
    sentences: Sequence[str]
    counts: Sequence[int]

    @staticmethod
    def of(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Filler:
        """The sentences of texts. Those that name digits are left out: answers are numbers.

        Raises:
            ValueError: there is none.
        """
        found = [sentence for text in texts for sentence in _sentences(text.content[:MAX_CHARACTERS])]
        if not found:
            raise ValueError(
                "the texts have no sentence without digits, in which recall could hide its facts; give prose"
            )
        # all at once, which takes seconds for books where one by one takes minutes
        ids = tokenizer([f" {one}" for one in found], add_special_tokens=False, verbose=False)["input_ids"]
        return Filler(tokenizer, found, [len(one) for one in ids])

    def count(self, text: str) -> int:
        """Tokens of a text, those that the tokenizer adds included."""
        return len(tokenize(self.tokenizer, text))

    def take(self, tokens: int, draw: random.Random) -> list[str]:
        """Sentences in their order from a drawn one on, of at most so many tokens; the texts begin anew where they end."""
        at, taken, room = draw.randrange(len(self.sentences)), [], tokens
        while self.counts[at % len(self.counts)] <= room:
            room -= self.counts[at % len(self.counts)]
            taken.append(self.sentences[at % len(self.sentences)])
            at += 1
        return taken


def _sentences(content: str) -> list[str]:
    parts = (" ".join(part.split()) for part in END.split(content))
    return [part[:LONGEST] for part in parts if part and not re.search(r"\d", part)]
