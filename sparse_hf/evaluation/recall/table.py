"""The tasks of recall by name, and which of them are asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .documents import Documents
from .ruler import RULER, Answer
from .tasks import SHORT, Task

TASKS: dict[str, Task] = {**SHORT, **RULER}
# tasks that ask about documents, and the format of the file that they need
OF_FILES = {"qa_1": "SQuAD", "qa_2": "HotpotQA"}
# names that stand for several
GROUPS = {"short": tuple(SHORT), "ruler": (*RULER, *OF_FILES)}


def choose_tasks(names: Sequence[str], files: Sequence[Path]) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks that are asked, and why others of a group are not.

    Args:
        names: of tasks and groups; by default the short ones, and those that ask about `files`.
        files: of questions about documents.

    Raises:
        ValueError: an unknown name, two files of one format, or a task by name whose file was not given.
    """
    of_files: dict[str, Task] = {}
    for documents in map(Documents.read, files):
        if documents.task in of_files:
            raise ValueError(f"questions has two files of {OF_FILES[documents.task]}; give one")
        of_files[documents.task] = Answer(documents.task, documents)
    known, left_out = {**TASKS, **of_files}, {}
    chosen: dict[str, Task] = {}
    for name in names or ("short", *of_files):
        for one in GROUPS.get(name, (name,)):
            if one in known:
                chosen[one] = known[one]
                continue
            if one not in OF_FILES:
                raise ValueError(f"there is no task {one!r}; there are {', '.join((*TASKS, *OF_FILES, *GROUPS))}")
            reason = (
                f"{one} asks about documents; give a file in the format of {OF_FILES[one]} as questions (--questions)"
            )
            if name not in GROUPS:
                raise ValueError(reason)
            left_out[one] = reason
    return chosen, left_out
