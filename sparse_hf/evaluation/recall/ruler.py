"""The thirteen tasks of RULER (arXiv:2404.06654), with its names, numbers and ways of counting.

How many keys, values and queries, links of a chain, repeats of a word, tokens of a reply: all are RULER's, and so is what stands
beside a fact. Wording and code are our own, and one fact stands at the depth that is asked about, where RULER draws it. Prose
comes from the user's texts.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from .documents import Documents
from .filler import Filler
from .tasks import COLOURS, PLACES, WORDS, Question, Task, filled

NOISE = "The grass grows. The sun shines. The wind blows. We walk on. Then we come home."
# words that are drawn from, the simple ones first
VOCABULARY = (
    *WORDS, *PLACES, *COLOURS,
    *(f"{colour}-{word}-{place}" for colour in COLOURS for word in WORDS for place in PLACES),
)  # fmt: skip
KEYS = tuple(f"{colour}-{word}" for colour in COLOURS for word in (*WORDS, *PLACES))
# texts that are shorter have fewer repeats of words and a shorter example
SHORT_TEXT = 4096
# links of the one chain of variables, and tokens of the example before it at the most
HOPS, EXAMPLE = 4, 470
# common words, and which ranks of coded words are asked for: the first is noise
COMMON, RANKS = 10, slice(1, 4)
# the exponent of the counts of coded words, by rank, letters of each, and tokens of a text for each
ALPHA, LETTERS, PER_WORD = 2.0, 6, 50
# tokens of a reply
NEEDLE_REPLY, CHAIN_REPLY, COMMON_REPLY, CODED_REPLY, ANSWER_REPLY = 128, 30, 120, 50, 32

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    """Needles `KEY: VALUE` in a haystack of noise, prose or other needles; all values of the queried keys are wanted.

    The first needle of the first queried key stands at `depth`, the others at places that are drawn.
    """

    name: str
    haystack: Literal["noise", "prose", "needles"]
    keys_are: Kind = "words"
    values_are: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    has_depth: bool = True

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        seed, start = draw.random(), draw.randrange(len(filler.sentences))

        def make(count: int) -> Question:
            return self._of(filler, start, count, depth, random.Random(seed))

        # as many straws as needles, so that each has a place of its own
        return filled(self.name, make, self.keys * self.values, filler, length, NEEDLE_REPLY)

    def _of(self, filler: Filler, start: int, count: int, depth: float, draw: random.Random) -> Question:
        held = {key: [_drawn(self.values_are, draw) for _ in range(self.values)] for key in self._keys(draw)}
        needles = [self._needle(key, value) for key, values in held.items() for value in values]
        straws = list(self._straws(filler, start, count, set(held), draw))
        first = round(depth * count)
        others = draw.sample([place for place in range(count + 1) if place != first], len(needles) - 1)
        lines = _among(straws, needles, [first, *others])
        asked = list(held)[: self.queries]
        what = " and ".join(asked) if len(asked) < 3 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        noun, verb = (self.values_are, "are") if self.queries * self.values > 1 else (self.values_are[:-1], "is")
        prompt = (
            f"The text below hides secret {self.values_are} of some keys. Remember them; you will be asked for them at its end.\n"
            f"{(' ' if self.haystack == 'prose' else chr(10)).join(lines)}\n"
            f"Which secret {noun} {verb} given for {what} in the text? The secret {noun} given for {what} in the text {verb}"
        )
        return Question(prompt, tuple(value for key in asked for value in held[key]), reply=NEEDLE_REPLY)

    def _keys(self, draw: random.Random) -> list[str]:
        wanted = max(self.keys, self.queries)
        return (
            draw.sample(KEYS, wanted)
            if self.keys_are == "words"
            else [_drawn(self.keys_are, draw) for _ in range(wanted)]
        )

    def _straws(self, filler: Filler, start: int, count: int, keys: set[str], draw: random.Random) -> Iterator[str]:
        for i in range(count):
            if self.haystack == "noise":
                yield NOISE
            elif self.haystack == "prose":
                yield filler.sentences[(start + i) % len(filler.sentences)]
            else:
                key = next(key for key in iter(lambda: _drawn(self.keys_are, draw), None) if key not in keys)
                yield self._needle(key, _drawn(self.values_are, draw))

    def _needle(self, key: str, value: str) -> str:
        return f"A secret {self.values_are[:-1]} of {key} is {value}."


@dataclass(frozen=True)
class Chain:
    """A value that is assigned, and copied from variable to variable in the order of the text; an example stands before it.

    All variables of the chain are wanted.
    """

    name: str = "vt"
    has_depth: bool = False

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        seeds = [draw.random() for _ in range(2)]
        room = max(min(EXAMPLE, length // 3), filler.count(self._of(1, 3, seeds[0]).prompt))
        example = filled(self.name, lambda count: self._of(count, 3, seeds[0]), 1, filler, room)
        before = f"{example.prompt}{example.wanted}\n\n"

        def make(count: int) -> Question:
            found = self._of(count, 5, seeds[1])
            return Question(before + found.prompt, found.answers, found.wording, CHAIN_REPLY)

        return filled(self.name, make, 1, filler, length, CHAIN_REPLY)

    def _of(self, count: int, letters: int, seed: float) -> Question:
        draw = random.Random(seed)
        value, names = (
            _drawn("numbers", draw, 5),
            _distinct(lambda: _letters(string.ascii_uppercase, letters, draw), HOPS + 1),
        )
        links = [f"VAR {name} = VAR {of}" for of, name in zip(names, names[1:], strict=False)]
        statements = [f"VAR {names[0]} = {value}", *links]
        noise = [NOISE] * count
        if count <= len(statements):
            # so little noise is cut into its sentences
            noise = [f"{part}." for part in " ".join(noise).removesuffix(".").split(". ")]
        places = sorted(draw.sample(range(len(noise)), len(statements)))
        prompt = (
            "The text below assigns values to variables, and copies them. Keep track of which variable has which value.\n\n"
            f"{chr(10).join(_among(noise, statements, places))}\n"
            f"Question: which variables have the value {value}? Answer: by the assignments above, the {len(names)} variables that have "
            f"the value {value} are:"
        )
        return Question(prompt, tuple(names), f" {' '.join(names)}", CHAIN_REPLY)


@dataclass(frozen=True)
class CommonWords:
    """The ten words that occur most often in a numbered list; a short list with its answer stands before it."""

    name: str = "cwe"
    has_depth: bool = False

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        is_short = length < SHORT_TEXT
        words, often, seldom = (20, 3, 1) if is_short else (40, 10, 3)
        seed = draw.random()
        example = self._of(words, often, seldom, draw)
        before = f"{example.prompt}{example.wanted}\n"

        def make(count: int) -> Question:
            found = self._of(count, *((6, 1) if is_short else (30, 3)), random.Random(seed))
            return Question(before + found.prompt, found.answers, found.wording, COMMON_REPLY)

        return filled(self.name, make, COMMON + 1, filler, length, COMMON_REPLY)

    def _of(self, count: int, often: int, seldom: int, draw: random.Random) -> Question:
        # longer lists take compound words in
        words = draw.sample(VOCABULARY[: max(3 * count, len(WORDS))], count)
        common = words[:COMMON]
        listed = common * often + words[COMMON:] * seldom
        draw.shuffle(listed)
        prompt = (
            "The words of this numbered list occur more or less often. Remember which occur most often.\n"
            f"{_numbered(listed)}\n"
            f"Question: which {COMMON} words occur most often in the list? Answer: the {COMMON} words that occur most often are:"
        )
        return Question(prompt, tuple(common), f" {_numbered(common)}", COMMON_REPLY)


@dataclass(frozen=True)
class CodedWords:
    """The three most frequent of coded words, whose counts fall with the square of their rank; the very first are dots."""

    name: str = "fwe"
    has_depth: bool = False

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        coded = _distinct(lambda: _letters(string.ascii_lowercase, LETTERS, draw), max(length // PER_WORD, 8))
        coded[0] = "..."
        seed = draw.random()
        # from so many words on the third is ahead of the fourth
        return filled(self.name, lambda count: self._of(coded, count, seed), 80, filler, length, CODED_REPLY)

    def _of(self, coded: list[str], count: int, seed: float) -> Question:
        drawn = [word for word, often in zip(coded, counts(count, len(coded)), strict=True) for _ in range(often)]
        random.Random(seed).shuffle(drawn)
        prompt = (
            f"Count how often each coded word occurs in this text, and find the three that occur most often. {' '.join(drawn)}\n"
            "Question: which three coded words occur most often? Pay no heed to the dots '...', and explain nothing. Answer: the three "
            "coded words that occur most often are:"
        )
        return Question(prompt, tuple(coded[RANKS]), f" {' '.join(coded[RANKS])}", CODED_REPLY)


@dataclass(frozen=True, eq=False)
class Answer:
    """A question about documents, of which one or some hold the answer and the others do not."""

    name: str
    documents: Documents
    has_depth: bool = False

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        asked = draw.choice(self.documents.asked)
        beside = [i for i in asked.near if i not in asked.gold]
        taken = {*asked.gold, *beside}
        far = [i for i in range(len(self.documents.texts)) if i not in taken]
        draw.shuffle(beside)
        draw.shuffle(far)
        seed = draw.random()

        def make(count: int) -> Question:
            chosen = [*asked.gold, *beside, *far][:count]
            random.Random(seed).shuffle(chosen)
            shown = [f"Document {number}:\n{self.documents.texts[i]}" for number, i in enumerate(chosen, 1)]
            instruction = "Answer the question from the given documents. Say the answer alone, and nothing else."
            prompt = (
                f"{instruction}\n\n{(chr(10) * 2).join(shown)}\n\n{instruction}\n\nQuestion: {asked.question} Answer:"
            )
            return Question(prompt, asked.answers, reply=ANSWER_REPLY, any_of=True)

        return filled(self.name, make, len(asked.gold), filler, length, ANSWER_REPLY)


def counts(count: int, ranks: int) -> list[int]:
    """How often the word of each rank occurs among about `count` words: rank to the power -2, whose sum is pi^2 / 6."""
    return [int(count * rank**-ALPHA / (math.pi**2 / 6)) for rank in range(1, ranks + 1)]


def _among(straws: list[str], needles: list[str], places: list[int]) -> list[str]:
    """The straws, with each needle before the straw of its place."""
    lines: list[str] = []
    for i in range(len(straws) + 1):
        lines += [needle for needle, place in zip(needles, places, strict=True) if place == i]
        lines += straws[i : i + 1]
    return lines


def _drawn(kind: Kind, draw: random.Random, digits: int = 7) -> str:
    if kind == "words":
        return draw.choice(KEYS)
    if kind == "uuids":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def _letters(alphabet: str, count: int, draw: random.Random) -> str:
    return "".join(draw.choices(alphabet, k=count))


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


RULER: dict[str, Task] = {
    task.name: task
    for task in (
        Needles("niah_single_1", "noise"),
        Needles("niah_single_2", "prose"),
        Needles("niah_single_3", "prose", values_are="uuids"),
        Needles("niah_multikey_1", "prose", keys=4),
        Needles("niah_multikey_2", "needles"),
        Needles("niah_multikey_3", "needles", keys_are="uuids", values_are="uuids"),
        Needles("niah_multivalue", "prose", values=4),
        Needles("niah_multiquery", "prose", keys=4, queries=4),
        Chain(),
        CommonWords(),
        CodedWords(),
    )
}
