"""Tasks of lm-evaluation-harness on files of the user's, asked by the harness itself, which does not have to be installed."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..pieces import Finished, Found, Piece
from ..subject import Contender
from .base import Setup, by_candidate, of_contenders

NAME = re.compile(r"^task:\s*['\"]?([\w.-]+)", re.MULTILINE)
# files of data that a task names, from the working directory or the root
DATA = re.compile(r"[\w./-]+\.(?:jsonl?|csv|parquet|txt)\b")
INSTALL = 'pip install "lm_eval[hf]>=0.4.13"'


class Harness:
    """What lm-evaluation-harness counts for tasks that the user names: multiple choice, questions, whatever a file of it describes.

    A task is a YAML file in the harness' format, over data of the user's (`dataset_path: json`). Likelihoods are those of the
    contender's own passes; a candidate that decodes densely reads answers by its pattern, too.
    """

    name: ClassVar[str] = "harness"

    def why_not(self, setup: Setup) -> str | None:
        if not setup.settings.harness:
            return "no task is named; give files of tasks in the format of lm-evaluation-harness (harness=, --harness)"
        if setup.subject.kind != "decoder":
            return f"{type(setup.subject.dense.model).__name__} says nothing; lm-evaluation-harness asks models ForCausalLM"
        if importlib.util.find_spec("lm_eval") is None:
            return f"lm-evaluation-harness is not installed: {INSTALL}"
        return None

    def pieces(self, setup: Setup) -> Iterator[Piece]:
        for i, file in enumerate(setup.settings.harness):
            what = {"task": task_name(Path(file)), "content": digest(Path(file))}
            yield from of_contenders(self.name, setup, _asked, Path(file), what, (4, i))

    def summary(self, setup: Setup, finished: Sequence[Finished]) -> Found:
        return {"candidates": {name: _summed(found) for name, found in by_candidate(finished).items()}}


def task_name(file: Path) -> str:
    """The name that a file gives its task.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file names none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a task's YAML file for lm-evaluation-harness")
    found = NAME.search(file.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{file} has no line 'task: NAME', by which lm-evaluation-harness finds tasks")
    return found[1]


def digest(file: Path) -> str:
    """A hash of a task's file and of the files of data that it names."""
    content = file.read_bytes()
    named = (Path(name) for name in DATA.findall(content.decode("utf-8")))
    return hashlib.sha256(b"\0".join([content, *(path.read_bytes() for path in named if path.is_file())])).hexdigest()


@torch.inference_mode()
def _asked(setup: Setup, contender: Contender, file: Path) -> Found:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    name, batch = task_name(file), setup.settings.batch
    model = HFLM(pretrained=contender.model, tokenizer=setup.subject.tokenizer, batch_size=batch)
    tasks = TaskManager(include_path=str(file.parent), include_defaults=False)
    # errors of figures by resampling take long, and say nothing of what a pattern loses on the same questions
    found = simple_evaluate(model=model, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=False)
    return {"task": name, "metrics": metrics(found["results"][name], found["higher_is_better"][name])}


def metrics(results: Mapping[str, Any], higher_is_better: Mapping[str, Any]) -> dict[str, float]:
    """Figures of which more is better, by their names without the harness' filters.

    Example:
        >>> metrics({"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A"}, {"acc": True})
        {'acc': 0.5}
    """
    named = ((key.partition(",")[0], value) for key, value in results.items())
    return {name: float(value) for name, value in named if higher_is_better.get(name) is True}


def _summed(found: Sequence[Found]) -> Found:
    """All tasks, and the mean over them of the first figure of each."""
    tasks = {one["task"]: one["metrics"] for one in found}
    firsts = [next(iter(of_task.values())) for of_task in tasks.values() if of_task]
    return {"score": sum(firsts) / len(firsts) if firsts else None, "tasks": tasks}
