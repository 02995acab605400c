"""Try every model type, write `docs/zoo.md`, `docs/zoo.json` and what `sparse-hf list` names, and fail if one that worked does so no more.

Types are shared out among processes. The files are written with the version of Transformers that `constraints.txt` names. With the oldest
supported one, of `constraints-oldest.txt`, another file is written, of which the page counts what works; with others types are tried, and
nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sparse_hf.models.derived.entry import WORKED
from tests.zoo.trial import OF_ITS_TEXT, answer, be_quiet

ROOT = Path(__file__).parents[2]
JSON, OLDEST, TEXT = (ROOT / "docs" / name for name in ("zoo.json", "zoo-oldest.json", "zoo.md"))
WRITTEN_WITH, OLDEST_WITH = (
    re.search(r"^transformers==(.+)$", (ROOT / name).read_text(), re.M)[1]
    for name in ("constraints.txt", "constraints-oldest.txt")
)
# version of Transformers -> the file of what works with it
FILES = {WRITTEN_WITH: JSON, OLDEST_WITH: OLDEST}
# tests of `trial` and what they are called in the table
COLUMNS = {
    "mask": "mask",
    "gradients": "gradients",
    "padding": "padding",
    "cache": "cache",
    "saved": "saved",
    "exported": "exported",
    "checkpointing": "checkpointing",
}
HEAD = """\
# The zoo

Every model type of Transformers {version}, tried with a tiny random model by `make zoo`, which
writes this page and `zoo.json`. {works} of {all} work: {verified} are **verified** (an entry of the
table, and tests of their own), {derived} are **derived** when they are first met; {composed} of
these are models of text and images or sounds around a text that is listed too. {refused} are
refused; the last table says why.{oldest}

A derived type is compared with its dense class when it is made sparse, on a tiny copy of its
configuration: under a pattern of all pairs, under a narrow pattern as an explicit mask where the
class takes one (`mask`), and for tokens that reach further than the pattern. The other columns are
what was tried beside: `gradients` equal to the dense class's, `padding` on either side, greedy
tokens with a `cache` equal to those without, a folder `saved` and loaded by an Auto class in a
process that has not met the type, `exported` back to the dense class, and gradient `checkpointing`.
`-` is what a class does not have, or does not do with text alone. Of models around a text
(positions `of its text`) `sparsify` makes the text sparse; they are tried with text alone, and no
folder of theirs is converted or exported.

## Verified

{names}

## Derived

{table}

## Refused

{reasons}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; by default all of them")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--resume", type=Path, help="file of answers so far, a line for each type; more are added to it"
    )
    given = parser.parse_args()
    file = FILES.get(transformers.__version__, JSON)
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["types"] if file.exists() else {}
    found = _tried(given.types or sorted(CONFIG_MAPPING_NAMES), given.processes, given.resume)
    lost = [line for name, entry in found.items() for line in worse(name, known.get(name, {}), entry)]
    counts = Counter(entry["status"] for entry in found.values())
    print(
        f"Transformers {transformers.__version__}:", ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    )
    if given.types:
        print(json.dumps(found, indent=2))
    if lost:
        print("\n".join(lost))
        return 1
    if not given.types and transformers.__version__ in FILES:
        content = {"transformers": transformers.__version__, "types": found}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not given.types and transformers.__version__ == WRITTEN_WITH:
        TEXT.write_text(_page(found), encoding="utf-8")
        worked = [name for name, entry in found.items() if entry["status"] == "derived"]
        WORKED.write_text(json.dumps({"transformers": WRITTEN_WITH, "types": worked}) + "\n", encoding="utf-8")
    return 0


def _tried(types: list[str], processes: int, answers: Path | None) -> dict[str, Any]:
    """What became of each type; of those in a file of answers, what it says."""
    found: dict[str, Any] = {}
    if answers is not None and answers.exists():
        found = dict(json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines())
    # libraries read these when a process imports them
    os.environ.update(OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
    left = [name for name in types if name not in found]
    # a process of its own is fresh in what it has derived, and ends before memory grows
    with get_context("spawn").Pool(processes, be_quiet, maxtasksperchild=60) as pool:
        for name, entry in zip(left, pool.imap(answer, left, chunksize=2), strict=True):
            found[name] = entry
            if answers is not None:
                with answers.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, entry]) + "\n")
    return {name: found[name] for name in types}


def worse(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What worked in a type and does no more."""
    if before.get("status", "refused") == "refused" or now["status"] == "verified":
        return []
    if now["status"] == "refused":
        return [f"{name} worked, and is refused: {now['reason']}"]
    return [f"{name}: {column} worked, and gives {now.get(column)!r}" for column in COLUMNS
            if before.get(column) is True and now.get(column) is not True]  # fmt: skip


def _page(found: dict[str, Any]) -> str:
    by = {s: {n: e for n, e in found.items() if e["status"] == s} for s in ("verified", "derived", "refused")}
    rows = ["| type | class | positions | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name, entry in by["derived"].items():
        cells = [_cell(entry.get(column)) for column in COLUMNS]
        rows.append(f"| {name} | {entry['class']} | {entry['positions']} | {' | '.join(cells)} |")
    reasons = ["| type | reason |", "|---|---|"]
    reasons += [f"| {name} | {entry['reason'].replace('|', '/')} |" for name, entry in by["refused"].items()]
    return HEAD.format(
        version=WRITTEN_WITH,
        works=len(by["verified"]) + len(by["derived"]),
        all=len(found),
        verified=len(by["verified"]),
        derived=len(by["derived"]),
        composed=sum(entry["positions"] == OF_ITS_TEXT for entry in by["derived"].values()),
        refused=len(by["refused"]),
        oldest=_of_oldest(),
        names=textwrap.fill(", ".join(by["verified"]), 100, break_on_hyphens=False),
        table="\n".join(rows),
        reasons="\n".join(reasons),
    )


def _of_oldest() -> str:
    """What works with the oldest supported version."""
    if not OLDEST.exists():
        return ""
    types = json.loads(OLDEST.read_text(encoding="utf-8"))["types"]
    works = sum(entry["status"] != "refused" for entry in types.values())
    return f" On {OLDEST_WITH}, the oldest supported\nversion, {works} of {len(types)} work (`zoo-oldest.json`)."


def _cell(value: Any) -> str:
    return "-" if value is None else "yes" if value is True else "no"


if __name__ == "__main__":
    sys.exit(main())
