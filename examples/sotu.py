"""State of the Union addresses as data: long documents, each with the party of who gave it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from examples.assets import SOTU, fetch

PARTIES = ("Democratic", "Republican")


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
