"""ACLSum: papers, and what experts say of each.

That is one sentence on its challenge, its approach and its outcome each.

250 papers of computational linguistics, 4,500 words the median and 19,000 the longest, of which 100
are for training and 50 for validation. Experts read abstract, introduction and conclusion; here a
text is the whole paper, as parsed from its PDF, with a line for each section's header, `3.1
Denoising Autoencoder`. Enough to fine-tune a model that can summarize already, and to try what it
does with long texts; too little to teach one from nothing.

The experts also marked the sentences of abstract, introduction and conclusion that say each of the
three. So questions can be asked whose answers stand in the text, at its beginning or at its end:
the answers are theirs, the words of the questions are ours.

The package says MIT; the papers are their authors', from the ACL Anthology.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from datasets import Dataset

from examples.assets import ACLSUM, fetch

ASPECTS = ("challenge", "approach", "outcome")
PARTS = ("abstract", "introduction", "conclusion")


def papers(split: str) -> Dataset:
    """`train`, `val` or `test`, with the columns id, text and summary."""
    folder = fetch(ACLSUM)
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(
        [
            {
                "id": row["id"],
                "text": text(folder / f"{row['id']}.json"),
                "summary": " ".join(row["summary"][aspect] for aspect in ASPECTS),
            }
            for row in rows
        ]
    )


def questions(split: str) -> Dataset:
    """Rows in SQuAD's shape, one for each aspect and section with marked sentences.

    The first marked sentence is the answer.
    """
    folder = fetch(ACLSUM)
    rows = []
    for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        paper = json.loads(line)
        context = text(folder / f"{paper['id']}.json")
        for aspect, part in itertools.product(ASPECTS, PARTS):
            marked = itertools.compress(paper["sentences"].get(part, ()), paper["highlights"][aspect].get(part, ()))
            spans = [span for sentence in marked if (span := place(sentence, context))]
            if spans:
                answers = {"text": [context[a:b] for a, b in spans], "answer_start": [a for a, _ in spans]}
                asked = f"Which {aspect} does the {part} name?"
                name = f"{paper['id']} {aspect} {part}"
                rows.append({"id": name, "question": asked, "context": context, "answers": answers})
    return Dataset.from_list(rows)


def place(sentence: str, context: str) -> tuple[int, int] | None:
    """Where a sentence begins and ends, however it is spaced.

    None if it stands there twice or not at all.
    """
    places = [i for i, character in enumerate(context) if not character.isspace()]
    wanted, found = "".join(sentence.split()), "".join(context[i] for i in places)
    if found.count(wanted) != 1:
        return None
    start = found.index(wanted)
    return places[start], places[start + len(wanted) - 1] + 1


def text(file: Path) -> str:
    paper = json.loads(file.read_text(encoding="utf-8"))
    parts = [paper["title"], "Abstract", paper["abstract"]]
    paragraphs = paper["pdf_parse"]["body_text"]
    for (number, header), section in itertools.groupby(paragraphs, lambda p: (p["sec_num"], p["section"])):
        # footnotes stand in no section
        if header:
            parts += [f"{number} {header}" if number else header, *(paragraph["text"] for paragraph in section)]
    return "\n".join(parts)
