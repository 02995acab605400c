"""The blocks of code of Markdown pages, and the cells of notebooks: found, run, and compared with the output that stands under them.

A block of Python runs after those above it on its page. A block of shell runs its lines of `sparse-hf`, in this process,
and of `python -c`; what else it says (pip, make, programs that serve or train for long) is not run. A block of text right
under a block is what it prints at the end, behind what training logs. `<!-- not run: reason -->` above a block leaves it out.

Pages speak of `my-llama`, `my-bert` and `my-texts.jsonl`, which stand in the folder that each page runs in.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from types import ModuleType
from unittest import mock

from tests.garbage import keep_libraries
from tests.processes import ROOT

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<excuse>[^\n]+?) -->\n)?```(?P<language>python|sh)\n(?P<code>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)


@dataclass(frozen=True)
class Snippet:
    """A block of code; `line` is how many lines stand before its first."""

    language: str
    line: int
    code: str
    output: str | None
    excuse: str | None


def snippets(text: str) -> Iterator[Snippet]:
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Snippet(match["language"], line, match["code"], match["output"], match["excuse"])


def run_all(paths: list[str]) -> dict[str, str]:
    """Run pages, notebooks and docstrings (by a dotted name) one after the other; gives what went wrong, or nothing, by path."""
    with tempfile.TemporaryDirectory() as models, tempfile.TemporaryDirectory() as cache:
        # read when the libraries are imported: nothing is fetched, and nothing outside of these folders is written
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache, "MPLBACKEND": "agg"}
        from examples import tiny

        tiny.write(Path(models))
        return {path: _run(path, Path(models)) for path in paths}


def _run(path: str, models: Path) -> str:
    """Run one in a folder of its own, which holds the tiny models; gives what went wrong, or nothing."""
    keep_libraries()
    before, run = Path.cwd(), {".md": run_page, ".ipynb": run_notebook}.get(Path(path).suffix, run_docstring)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        os.chdir(folder)
        try:
            run(path)
        except Exception:
            return traceback.format_exc()
        finally:
            os.chdir(before)
    return ""


def run_page(path: str) -> None:
    module = ModuleType(f"docs_{Path(path).stem.replace('-', '_')}")
    sys.modules[module.__name__] = module
    for snippet in snippets(Path(path).read_text(encoding="utf-8")):
        if snippet.excuse is None:
            _check(snippet, _printed(snippet, Path(path), module))


def run_notebook(path: str) -> None:
    """Run a notebook's cells, without a kernel."""
    space: dict[str, object] = {}
    for number, cell in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))["cells"], 1):
        if cell["cell_type"] != "code":
            continue
        wanted = "".join("".join(out["text"]) for out in cell["outputs"] if out.get("name") == "stdout")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), f"{path}, cell {number}", "exec"), space)
        assert _lines(said.getvalue()) == _lines(wanted), f"cell {number} printed\n{said.getvalue()}"


def run_docstring(name: str) -> None:
    """Run the example of a docstring, which may speak of torch, the Auto classes and the padding collator."""
    import torch
    import transformers

    known = {
        one: getattr(transformers, one) for one in ("AutoModelForCausalLM", "AutoTokenizer", "DataCollatorWithPadding")
    }
    found, module = documented(name)
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(recurse=False).find(found, name, globs={**vars(module), **known, "torch": torch}):
        runner.run(test, out=said.write)
    assert not runner.failures, said.getvalue()


def documented(name: str) -> tuple[object, ModuleType]:
    """What a dotted name of the reference stands for, and the module that it is in."""
    try:
        module = importlib.import_module(name)
        return module, module
    except ModuleNotFoundError:
        module = importlib.import_module(name.rpartition(".")[0])
        return getattr(module, name.rpartition(".")[2]), module


def _printed(snippet: Snippet, page: Path, module: ModuleType) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if snippet.language == "sh":
            run_commands(snippet.code)
        else:
            # the lines that errors name are those of the page
            exec(compile("\n" * snippet.line + snippet.code, str(page), "exec"), vars(module))
    return said.getvalue()


def _check(snippet: Snippet, said: str) -> None:
    wanted, found = (_lines(text) for text in (snippet.output or "", said))
    assert snippet.output is None or found[-len(wanted) :] == wanted, f"line {snippet.line}: printed\n{said}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def run_commands(code: str) -> None:
    """Run the lines of `sparse-hf`, as in a terminal of 80 columns, and of `python -c`."""
    from sparse_hf.cli import main

    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-c"]:
            path = {"PYTHONPATH": str(ROOT)}
            print(
                subprocess.run(
                    [sys.executable, *words[1:]], env=os.environ | path, stdout=PIPE, text=True, check=True
                ).stdout,
                end="",
            )
        if words[:1] != ["sparse-hf"]:
            continue
        with mock.patch.object(sys, "argv", words), mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            try:
                main()
            except SystemExit as end:
                assert not end.code, f"{line} ended with {end.code}"
