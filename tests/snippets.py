"""The blocks of code of Markdown pages, and the cells of notebooks: found, run, and compared with the output that stands under them.

A block of Python runs after those above it on its page. A block of shell runs its lines of `sparse-hf`, in this process,
and of `python -c`; what else it says (pip, make, programs that serve or train for long) is not run. A block of text right
under a block is what it prints at the end, behind what training logs. `<!-- not run: reason -->` above a block leaves it out.

Pages speak of `my-llama`, `my-bert` and `my-texts.jsonl`, which stand in the folder that each page runs in.
"""

from __future__ import annotations

import contextlib
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
    """Run pages and notebooks one after the other; gives what went wrong, or nothing, by path."""
    with tempfile.TemporaryDirectory() as models, tempfile.TemporaryDirectory() as cache:
        # read when the libraries are imported: nothing is fetched, and nothing outside of these folders is written
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache, "MPLBACKEND": "agg"}
        from examples import tiny

        tiny.write(Path(models))
        return {
            path: run_notebook(Path(path)) if path.endswith(".ipynb") else run_page(Path(path), Path(models))
            for path in paths
        }


def run_page(page: Path, models: Path) -> str:
    """Run a page in a folder of its own, which holds the tiny models; gives what went wrong, or nothing."""
    module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        os.chdir(folder)
        try:
            for snippet in snippets(page.read_text(encoding="utf-8")):
                if snippet.excuse is None:
                    _check(snippet, _printed(snippet, page, module))
        except Exception:
            return traceback.format_exc()
        finally:
            os.chdir(before)
    return ""


def run_notebook(path: Path) -> str:
    """Run a notebook's cells, without a kernel; gives what went wrong, or nothing."""
    space: dict[str, object] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
        if cell["cell_type"] != "code":
            continue
        wanted = "".join("".join(out["text"]) for out in cell["outputs"] if out.get("name") == "stdout")
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), space)
            assert _lines(said.getvalue()) == _lines(wanted), f"cell {number} printed\n{said.getvalue()}"
        except Exception:
            return traceback.format_exc()
    return ""


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
            print(subprocess.run([sys.executable, *words[1:]], env=os.environ | path, stdout=PIPE, text=True, check=True).stdout, end="")
        if words[:1] != ["sparse-hf"]:
            continue
        with mock.patch.object(sys, "argv", words), mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            try:
                main()
            except SystemExit as end:
                assert not end.code, f"{line} ended with {end.code}"
