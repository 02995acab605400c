"""Tasks of lm-evaluation-harness on files of the user's."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import pytest

from sparse_hf.evaluation import Settings, evaluate
from sparse_hf.evaluation.probes.harness import digest, metrics, task_name
from tests.evaluation.tiny import TEXT, tiny_model, tokenizer

ROWS = [
    {"text": f"The {thing} stands", "choices": [" by the river", " nowhere"], "label": 0}
    for thing in ("house", "tree", "lamp")
]
TASK = """task: where_it_stands
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    return tmp_path / "task.yaml"


def run(model, task, patterns, out=None):
    settings = Settings(length=96, harness=(task,), progress=False)
    probes = ["harness"]
    return evaluate(model, patterns, [TEXT], probes=probes, tokenizer=tokenizer(), settings=settings, out=out).result


class Given:
    """Stands for the harness: it says how it was called, and scores models by their patterns."""

    def __init__(self, monkeypatch):
        self.calls = []
        modules = {
            name: types.ModuleType(name)
            for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
        }
        modules["lm_eval"].__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
        modules["lm_eval"].simple_evaluate = self.evaluated
        modules["lm_eval.models.huggingface"].HFLM = lambda **given: given
        modules["lm_eval.tasks"].TaskManager = lambda **given: given
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def evaluated(self, model, tasks, task_manager, **_options):
        self.calls.append((type(model["pretrained"]).__name__, tasks, task_manager["include_path"]))
        score = 0.8 if len(self.calls) == 1 else 0.6
        results = {"alias": "x", "acc,none": score, "acc_stderr,none": "N/A", "perplexity,none": 3.0}
        return {"results": {tasks[0]: results}, "higher_is_better": {tasks[0]: {"acc": True, "perplexity": False}}}


def test_scores_stand_beside_the_dense_one(task, tmp_path, monkeypatch):
    given = Given(monkeypatch)
    found = run(tiny_model(), task, {"narrow": "window(3, 0)"}, tmp_path / "out")
    assert [call[1:] for call in given.calls] == [(["where_it_stands"], str(tmp_path))] * 2
    of_probe = found["probes"]["harness"]["candidates"]
    assert of_probe["dense"] == {"score": 0.8, "tasks": {"where_it_stands": {"acc": 0.8}}}
    assert of_probe["narrow"]["score"] == 0.6
    (verdict,) = found["verdicts"]
    assert verdict["verdict"] == "heal first"
    assert "scores 60.0% in tasks of lm-evaluation-harness, dense 80.0%" in verdict["reasons"]
    assert "<th>harness" in (tmp_path / "out" / "report.html").read_text().replace(' scope="col"', "")
    # what is finished is not asked again, until the data change
    run(tiny_model(), task, {"narrow": "window(3, 0)"}, tmp_path / "out")
    assert len(given.calls) == 2
    before = digest(task)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert digest(task) != before


def test_a_window_of_everything_scores_as_the_dense_model(task):
    pytest.importorskip("lm_eval")
    found = run(tiny_model(), task, {"all": "window(None, 0)", "narrow": "window(3, 0)"})["probes"]["harness"][
        "candidates"
    ]
    assert found["dense"]["tasks"]["where_it_stands"].keys() == {"acc"} and found["all"] == found["dense"]


def test_figures_of_which_more_is_better():
    results = {"alias": "x", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "word_perplexity,none": 9.0}
    assert metrics(results, {"exact_match": True, "word_perplexity": False}) == {"exact_match": 0.25}


def test_without_tasks_nobody_misses_it():
    settings = Settings(length=96, lengths=(260,), depths=(0.5,), tasks=("passkey",), progress=False)
    found = evaluate(tiny_model(), "window(3, 0)", [TEXT], tokenizer=tokenizer(), settings=settings)
    assert "harness" not in found.result["left_out"] and "harness" not in found.result["probes"]


def test_bad_input(task, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist; give a task's YAML file"):
        task_name(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match="has no line 'task: NAME'"):
        task_name(tmp_path / "empty.yaml")
    with pytest.raises(ValueError, match="probe harness: no task is named"):
        evaluate(
            tiny_model(),
            "window(3, 0)",
            [TEXT],
            probes=["harness"],
            tokenizer=tokenizer(),
            settings=Settings(length=96),
        )
    Given(monkeypatch)
    with pytest.raises(ValueError, match="SparseBertModel says nothing"):
        run(tiny_model("BertModel"), task, "window(3, 3)")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is not installed: pip install"):
        run(tiny_model(), task, "window(3, 0)")
