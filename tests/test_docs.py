"""The documentation is true: links lead somewhere, names exist, and examples run as they are written."""

from __future__ import annotations

import importlib
import json
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import ROOT, printed

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted([*DOCS.glob("adding-*.md"), *(DOCS / "concepts").glob("*.md")])
# pages whose prose keeps to this width
MAX_LINE = 100
OLDER = {ROOT / "README.md", DOCS / "MEASUREMENTS.md", DOCS / "results" / "README.md"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """A page whose blocks of code are left out."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link may say behind `#`: headings in lower case, with dashes for spaces and no punctuation."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{name_of(page)} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", sorted(set(PAGES) - OLDER), ids=name_of)
def test_lines_of_prose_are_short(page):
    long = [line for line in without_code(page.read_text()).splitlines() if len(line) > MAX_LINE and line[:1] != "|"]
    assert not long


def test_every_page_can_be_found_from_the_index():
    found, new = set(), {DOCS / "index.md"}
    while new:
        page = new.pop()
        found.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(page.read_text()))
        new |= {(page.parent / target).resolve() for target in targets if target.endswith(".md")} - found
    assert set(PAGES) <= found


def entries() -> Iterator[tuple[str, list[tuple[Path, list[str]]]]]:
    """What the index answers: each question, and the files and names that it tells to look at."""
    table = (DOCS / "index.md").read_text().split("| to change | look at |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        question, answer = (part.strip() for part in re.split(r"(?<!\\)\|", line)[1:3])
        if answer:
            files = (CODE.findall(one) for one in answer.split(";"))
            yield question, [(ROOT / path, names) for path, *names in files]


@pytest.mark.parametrize(("question", "answers"), [pytest.param(*entry, id=entry[0]) for entry in entries()])
def test_what_the_index_names_exists(question, answers):
    assert answers
    for path, names in answers:
        assert path.suffix == ".py" and path.is_file() and names, f"{question}: {path}"
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in names:
            found = module
            for part in name.split("."):
                assert hasattr(found, part), f"{question}: {name_of(path)} has no {name}"
                found = getattr(found, part)


def test_the_index_answers_enough():
    assert len(list(entries())) >= 25


def named_files(page: Path) -> Iterator[str]:
    """Files that a page names in its prose: paths that begin with a folder of the repository or a room of the package."""
    tops = {path.name for path in (*ROOT.iterdir(), *(ROOT / "sparse_hf").iterdir()) if path.is_dir()}
    for span in CODE.findall(without_code(page.read_text())):
        if re.fullmatch(r"[\w./-]+\.(py|md|json|svg|pyi)", span) and span.split("/")[0] in tops and "/" in span:
            yield span


@pytest.mark.parametrize("page", sorted(set(PAGES) - OLDER), ids=name_of)
def test_files_that_are_named_exist(page):
    for span in named_files(page):
        assert any((base / span).exists() for base in (ROOT, ROOT / "sparse_hf")), f"{name_of(page)} names {span}"


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The blocks of Python code of a page, and the lines before each."""
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, match.start(1)), match[1]


def run_examples() -> dict[str, str]:
    """Run the code of every page, each as a module of its own; gives what went wrong, by page."""
    errors = {}
    for page in EXAMPLES:
        module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
        sys.modules[module.__name__] = module
        errors[name_of(page)] = ""
        try:
            for before, code in blocks(page):
                # the lines that errors name are those of the page
                exec(compile("\n" * before + code, str(page), "exec"), vars(module))
        except Exception:
            errors[name_of(page)] = traceback.format_exc()
    return errors


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    # in a process of their own: they add patterns, backends and families
    code = "import json; from tests.test_docs import run_examples; print('errors:' + json.dumps(run_examples()))"
    return json.loads(printed(code).rpartition("errors:")[2])


@pytest.mark.parametrize("page", EXAMPLES, ids=name_of)
def test_examples_run(page, errors):
    assert list(blocks(page)), f"{name_of(page)} has no example"
    assert not errors[name_of(page)], errors[name_of(page)]
