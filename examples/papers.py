"""Papers and what experts say of each, in one sentence on its challenge, its approach and its outcome: ACLSum.

250 papers of computational linguistics, 4,500 words the median and 19,000 the longest, of which 100 are for training and 50 for
validation. Experts read abstract, introduction and conclusion; here a text is the whole paper, as parsed from its PDF, with
a line for each section's header, `3.1 Denoising Autoencoder`. Enough to fine-tune a model that can summarize already, and
to try what it does with long texts; too little to teach one from nothing.

The package says MIT; the papers are their authors', from the ACL Anthology.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from datasets import Dataset

from examples.assets import ACLSUM, fetch

ASPECTS = ("challenge", "approach", "outcome")


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


def text(file: Path) -> str:
    paper = json.loads(file.read_text(encoding="utf-8"))
    parts = [paper["title"], "Abstract", paper["abstract"]]
    paragraphs = paper["pdf_parse"]["body_text"]
    for (number, header), section in itertools.groupby(paragraphs, lambda p: (p["sec_num"], p["section"])):
        # footnotes stand in no section
        if header:
            parts += [f"{number} {header}" if number else header, *(paragraph["text"] for paragraph in section)]
    return "\n".join(parts)
