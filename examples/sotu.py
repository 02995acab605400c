"""State of the Union addresses: long documents, each with its speaker's party."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from examples import tiny
from examples.assets import SOTU, fetch

PARTIES = ("Democratic", "Republican")
# as many parts as the presidents are dealt to; each part is asked for once
SPLITS = 5


@dataclass(frozen=True)
class Speech:
    year: int
    president: str
    party: str
    text: str


def speeches() -> list[Speech]:
    """Those of Democrats and Republicans, by year: 182 of 33 presidents, 1829 to 2021."""
    found = []
    for file in sorted(fetch(SOTU).glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        found.append(Speech(content["year"], content["name"], content["party"], content["text"]))
    return found


def tiny_speeches() -> list[Speech]:
    """Only the end says who speaks; the beginning fills a short row."""
    found = tiny.texts(80)
    words = ["Fellow citizens of the Senate and of the House"] * 2
    return [
        Speech(1800 + i, f"president {i % 20}", PARTIES[text["label"]], "\n".join([*words, text["text"]]))
        for i, text in enumerate(found)
    ]


def split(found: list[Speech], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which are learned from and which are asked for.

    Each of `SPLITS` seeds in a row asks for other presidents.
    """
    folds = StratifiedGroupKFold(SPLITS, shuffle=True, random_state=seed // SPLITS)
    parties, presidents = [s.party for s in found], [s.president for s in found]
    return list(folds.split(found, parties, presidents))[seed % SPLITS]


class Documents:
    """Speeches as token ids, and their labels."""

    def __init__(self, found: list[Speech], tokenizer):
        self.found, self.tokenizer = found, tokenizer
        self.labels = np.array([PARTIES.index(speech.party) for speech in found])
        self.years = np.array([[speech.year] for speech in found])
        self.presidents = np.array([speech.president for speech in found])
        self.ids = [tokenizer(speech.text, add_special_tokens=False).input_ids for speech in found]

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return split(self.found, seed)

    def rows(self, chosen: np.ndarray, length: int, most: int = 1) -> tuple[list[dict], np.ndarray]:
        """Up to `most` rows of each speech, and the index in `chosen` that each is of.

        Class token and separator are included.
        """
        rows, places, step = [], [], length - 2
        for place, i in enumerate(chosen):
            for at in range(0, min(len(self.ids[i]), most * step), step):
                ids = [self.tokenizer.cls_token_id, *self.ids[i][at : at + step], self.tokenizer.sep_token_id]
                rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(self.labels[i])})
                places.append(place)
        return rows, np.array(places)

    def bags(self, chosen: np.ndarray, length: int) -> list[list[str]]:
        return [[str(token) for token in self.ids[i][: length - 2]] for i in chosen]
