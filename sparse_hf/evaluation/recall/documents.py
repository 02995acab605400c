"""Questions about documents, from files in the formats of SQuAD and HotpotQA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A question: its answers, of which any is right, the documents that hold it, and others that are near."""

    question: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents by number, and questions about them. `task` is the name of RULER's task that asks such."""

    task: str
    texts: tuple[str, ...]
    asked: tuple[Asked, ...]

    @staticmethod
    def read(path: str | Path) -> Documents:
        """The documents and questions of a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: neither format, or no question that has an answer.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file of questions {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = _squad(content) if isinstance(content, dict) else _hotpot(content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is in neither format of questions; give JSON as SQuAD has it ('data', 'paragraphs', 'qas') or HotpotQA "
                f"('question', 'answer', 'context'): {type(error).__name__} {error}"
            ) from error
        if not found.asked:
            raise ValueError(f"{path} has no question that has an answer")
        return found


def _squad(content: Any) -> Documents:
    articles = content["data"]
    numbers = _numbers(paragraph["context"] for article in articles for paragraph in article["paragraphs"])
    return Documents("qa_1", tuple(numbers), tuple(_asked_in(articles, numbers)))


def _asked_in(articles: Any, numbers: dict[str, int]) -> Iterator[Asked]:
    for article in articles:
        near = tuple(numbers[paragraph["context"]] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            for one in paragraph["qas"]:
                if not one.get("is_impossible") and one["answers"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in one["answers"]))
                    yield Asked(one["question"], answers, (numbers[paragraph["context"]],), near)


def _hotpot(content: Any) -> Documents:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]] for one in content]
    numbers = _numbers(text for of_one in texts for text in of_one)
    # all ten documents of a question belong to it
    asked = (
        Asked(one["question"], (one["answer"],), tuple(dict.fromkeys(numbers[text] for text in of_one)))
        for one, of_one in zip(content, texts, strict=True)
    )
    return Documents("qa_2", tuple(numbers), tuple(asked))


def _numbers(texts: Iterator[str]) -> dict[str, int]:
    """Distinct texts with their numbers."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}
