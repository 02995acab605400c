"""Tasks of recall: facts in a long text, and a question that only they answer.

These are short forms of RULER's (arXiv:2404.06654): a passkey, one needle, several needles of which one is asked for or of which
all values are, variables that are copied from each other, keys with values that fill the whole text, and the most frequent words
of a list. Words and numbers are drawn. RULER's thirteen with its own numbers are in `ruler.py`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .filler import Filler

PLACES = (
    "harbour", "granary", "orchard", "foundry", "library", "quarry", "chapel", "tannery", "brewery", "armoury", "bakery",
    "cannery", "dairy", "ferry", "garage", "hospital", "kennel", "laundry", "market", "nursery", "observatory", "pharmacy",
)  # fmt: skip
COLOURS = (
    "amber", "black", "blue", "brown", "crimson", "golden", "green", "grey", "ivory", "maroon", "olive", "orange", "pink",
    "purple", "red", "scarlet", "silver", "violet", "white", "yellow",
)  # fmt: skip
WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle", "ladder",
    "mirror", "needle", "ocean", "pencil", "quilt", "river", "saddle", "table", "umbrella", "valley", "window", "yarn", "anchor",
    "basket", "carpet", "dragon", "eagle", "forest", "guitar", "helmet", "insect", "jungle", "kitchen", "lantern", "meadow",
    "napkin", "orchid", "pepper", "rabbit", "scissors", "thunder", "violin", "wagon", "zebra", "button", "castle", "dolphin",
)  # fmt: skip
# needles beside the one that is asked for, values of one key, links of a chain of variables
NEEDLES, VALUES, LINKS = 3, 3, 3
# words that are most frequent, how often each occurs, and how often the others do
COMMON, OFTEN, SELDOM = 3, 12, 2


@dataclass(frozen=True)
class Question:
    """A text that ends where the answer begins, and what the answer must hold; `share` says how much of it a reply does.

    Args:
        prompt: the text.
        answers: all of them are wanted, or any one.
        wording: the answer as it is said right behind the prompt; by default the answers with commas.
        reply: tokens that a model may take to answer; by default few more than the answer has.
        any_of: the answers say the same, and one is enough.
    """

    prompt: str
    answers: tuple[str, ...]
    wording: str | None = None
    reply: int | None = None
    any_of: bool = False

    @property
    def wanted(self) -> str:
        """The answer as it stands behind the prompt."""
        said = self.answers[:1] if self.any_of else self.answers
        return f" {', '.join(said)}" if self.wording is None else self.wording

    @property
    def digest(self) -> str:
        """A hash of the text, the answers and how many tokens a reply may take."""
        said = f"{self.prompt}\n{self.answers}\n{self.wanted}\n{self.reply} {self.any_of}"
        return hashlib.sha256(said.encode()).hexdigest()[:20]

    def share(self, reply: str) -> float:
        """The share of the answers that a reply holds, whatever their case."""
        held = [answer.lower() in reply.lower() for answer in self.answers]
        return float(any(held)) if self.any_of else sum(held) / len(held)


class Task(Protocol):
    """`name` is what a user says; without `has_depth` a question has no single place in the text."""

    @property
    def name(self) -> str: ...

    @property
    def has_depth(self) -> bool: ...

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        """A question of at most `length` tokens.

        Raises:
            ValueError: too few for the facts alone.
        """
        ...


@dataclass(frozen=True)
class InProse:
    """Facts among sentences of the user's texts: the first at `depth`, the others at places that are drawn.

    `make` gives facts, the question with the beginning of its answer, and the answers.
    """

    name: str
    make: Callable[[random.Random], tuple[list[str], str, tuple[str, ...]]]
    has_depth: bool = True

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        facts, question, answers = self.make(draw)
        begin = "Some facts are hidden in the text below. Remember them, and answer the question at its end."
        bare = f"{begin}\n\n{' '.join(facts)}\n\n{question}"
        room = _room(self.name, filler, bare, length)
        sentences = filler.take(room, draw)
        while True:
            prompt = f"{begin}\n\n{' '.join(_hidden(facts, sentences, depth, random.Random(length)))}\n\n{question}"
            over = filler.count(prompt) - length
            if over <= 0:
                return Question(prompt, answers)
            # tokens that join differently, at most a few
            sentences = sentences[:-1]


@dataclass(frozen=True)
class InList:
    """Lines that fill the text by themselves.

    `make` gives as many lines as are asked for, with the line that is asked for at `depth`, the question, and the answers.
    """

    name: str
    begin: str
    make: Callable[[int, float, random.Random], tuple[list[str], str, tuple[str, ...]]]
    least: int
    has_depth: bool = True

    def ask(self, filler: Filler, length: int, depth: float, draw: random.Random) -> Question:
        seed = draw.random()
        return filled(self.name, lambda count: self._of(count, depth, random.Random(seed)), self.least, filler, length)

    def _of(self, count: int, depth: float, draw: random.Random) -> Question:
        lines, question, answers = self.make(count, depth, draw)
        return Question(f"{self.begin}\n\n{chr(10).join(lines)}\n\n{question}", answers)


def filled(
    name: str, make: Callable[[int], Question], least: int, filler: Filler, length: int, reply: int = 0
) -> Question:
    """The question with as many things as `length` tokens hold beside a reply; `make` gives it with a number of them.

    Raises:
        ValueError: not even the least number fits.
    """
    fits, count = None, least
    # as many are added as their mean length says, until no more fit
    while True:
        found = make(count)
        tokens = filler.count(found.prompt) + reply
        if tokens > length or found == fits:
            # no more fits, or there is no more
            break
        fits, count = found, count + max(1, (length - tokens) * count // (2 * tokens))
    if fits is None:
        raise ValueError(_too_short(name, tokens, length))
    return fits


def _room(name: str, filler: Filler, bare: str, length: int) -> int:
    tokens = filler.count(bare)
    if tokens > length:
        raise ValueError(_too_short(name, tokens, length))
    return length - tokens


def _too_short(name: str, tokens: int, length: int) -> str:
    return f"the facts of {name} alone take {tokens} tokens, and {length} are asked about; raise lengths, or leave out {name}"


def _hidden(facts: list[str], sentences: list[str], depth: float, draw: random.Random) -> list[str]:
    """The facts among the sentences, the first of them at `depth`."""
    places = [round(depth * len(sentences)), *(draw.randint(0, len(sentences)) for _ in facts[1:])]
    hidden: list[str] = []
    for i in range(len(sentences) + 1):
        hidden += [fact for fact, place in zip(facts, places, strict=True) if place == i]
        hidden += sentences[i : i + 1]
    return hidden


def _number(draw: random.Random, digits: int = 5) -> str:
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def _passkey(draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    key = _number(draw)
    return (
        [f"The pass key is {key}. Remember it: {key} is the pass key."],
        "What is the pass key? The pass key is",
        (key,),
    )


def _needle(draw: random.Random, others: int = 0) -> tuple[list[str], str, tuple[str, ...]]:
    names = draw.sample([f"{colour} {place}" for colour in COLOURS for place in PLACES], others + 1)
    codes = [_number(draw) for _ in names]
    facts = [f"The code of the {name} is {code}." for name, code in zip(names, codes, strict=True)]
    question = f"What is the code of the {names[0]}? The code of the {names[0]} is"
    return facts, question, (codes[0],)


def _needles(draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    return _needle(draw, NEEDLES)


def _values(draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    name, codes = f"{draw.choice(COLOURS)} {draw.choice(PLACES)}", tuple(_number(draw) for _ in range(VALUES))
    facts = [f"One of the codes of the {name} is {code}." for code in codes]
    return facts, f"Which codes does the {name} have? The codes of the {name} are", codes


def _variables(draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    value, names = _number(draw), [f"X{number}" for number in draw.sample(range(10, 100), LINKS + 1)]
    facts = [f"Variable {names[0]} is set to {value}."]
    facts += [f"Variable {name} is a copy of variable {of}." for of, name in zip(names, names[1:], strict=False)]
    return facts, f"Which variables hold {value}? The variables that hold {value} are {names[0]} and", tuple(names[1:])


def _pairs(count: int, depth: float, draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    # the line that is asked for is drawn first, so that it stays the same whatever fits beside it
    asked, value = _number(draw, 6), _number(draw, 6)
    lines = [f"key {_number(draw, 6)}: value {_number(draw, 6)}" for _ in range(count - 1)]
    lines.insert(round(depth * (count - 1)), f"key {asked}: value {value}")
    return lines, f"Which value has key {asked}? key {asked}: value", (value,)


def _words(count: int, depth: float, draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    names = draw.sample(WORDS, COMMON)
    others = [word for word in WORDS if word not in names]
    drawn = [name for name in names for _ in range(OFTEN)]
    # the more text, the more often each of the others; the common ones stay ahead
    rounds = 1 + count // (len(others) * SELDOM)
    drawn = drawn * rounds + [others[i % len(others)] for i in range(count)]
    draw.shuffle(drawn)
    lines = [f"{number}. {word}" for number, word in enumerate(drawn, 1)]
    return lines, f"Which {COMMON} words occur most often in the list? The words are", tuple(names)


SHORT: dict[str, Task] = {
    task.name: task
    for task in (
        InProse("passkey", _passkey),
        InProse("needle", _needle),
        InProse("needles", _needles),
        InProse("values", _values),
        InProse("variables", _variables),
        InList("pairs", "Remember the value of each key.", _pairs, 2),
        InList("words", "Count how often each word occurs in this list.", _words, 1, has_depth=False),
    )
}
