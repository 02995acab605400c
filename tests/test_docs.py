"""The documentation is true: links lead somewhere, names exist, figures are those of the results, and code runs as it is written."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_hf
from tests import readme
from tests.processes import ROOT, printed
from tests.snippets import documented, snippets

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SNIPPETS = {page: list(snippets(page.read_text(encoding="utf-8"))) for page in PAGES}
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
API = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "api.md").read_text(encoding="utf-8"), re.M)
EXAMPLES = [page for page, found in SNIPPETS.items() if found]
# pages whose prose keeps to this width
MAX_LINE = 100
OLDER = {DOCS / "MEASUREMENTS.md", DOCS / "results" / "README.md"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")


def public_names() -> Iterator[str]:
    """Dotted names of all that is public: what the reference describes, and what `sparse_hf` gives."""
    for name in API:
        found, module = documented(name)
        if found is not module:
            yield name
            continue
        members = inspect.getmembers(module, inspect.isfunction)
        yield from (f"{name}.{one}" for one, of in members if of.__module__ == name and not one.startswith("_"))
    # classes of models are derived from those of Transformers, all of them when one asks for it
    mixins = {"SparseMixin", "SparseConfigMixin"}
    for name in {name for name in dir(sparse_hf) if not name.startswith("Sparse")} | mixins:
        found = getattr(sparse_hf, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            yield f"{found.__module__}.{found.__name__}"


DOCUMENTED = sorted(set(public_names()))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """A page whose blocks of code are left out."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link may say behind `#`: headings in lower case, with dashes for spaces and no punctuation."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_no_page_has_both_sides_of_a_merge(page):
    assert not re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", page.read_text(), re.M)


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
    # a link counts as what is read of it
    lines = re.sub(r"\]\([^)]*\)", "]", without_code(page.read_text())).splitlines()
    long = [line for line in lines if len(line) > MAX_LINE and line[:1] != "|"]
    assert not long


def test_every_page_can_be_found_from_the_index():
    found, new = set(), {DOCS / "index.md"}
    while new:
        page = new.pop()
        found.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(page.read_text()))
        new |= {(page.parent / target).resolve() for target in targets if target.endswith(".md")} - found
    assert set(PAGES) <= found


def test_every_page_is_in_the_menu_of_the_site():
    menu = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert {name_of(page) for page in PAGES} <= set(menu)


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


def test_every_block_is_of_a_kind_that_is_run():
    for page in PAGES:
        found = len(re.findall(r"^ *```(?:python|sh)$", page.read_text(), re.M))
        assert found == len(SNIPPETS[page]), f"{name_of(page)} has blocks that are not found, perhaps indented ones"
        other = set(re.findall(r"^ *```(\S+)$", page.read_text(), re.M)) - {"python", "sh", "text"}
        assert not other, f"{name_of(page)} has blocks of {other}"


def test_few_blocks_are_not_run():
    found = [snippet for page in EXAMPLES for snippet in SNIPPETS[page] if snippet.language == "python"]
    left_out = [snippet for snippet in found if snippet.excuse is not None]
    assert len(left_out) <= 0.1 * len(found)


def errors_of(names: list[str]) -> dict[str, str]:
    # in a process of their own: they add patterns, backends and families
    code = f"import json; from tests.snippets import run_all; print('errors:' + json.dumps(run_all({names!r})))"
    return json.loads(printed(code).rpartition("errors:")[2])


# apart, since workers that share the tests out have one of the two each
@pytest.fixture(scope="module")
def errors_of_pages() -> dict[str, str]:
    return errors_of([str(path) for path in (*EXAMPLES, *NOTEBOOKS)])


@pytest.fixture(scope="module")
def errors_of_docstrings() -> dict[str, str]:
    return errors_of(list(DOCUMENTED))


@pytest.mark.parametrize("path", [*EXAMPLES, *NOTEBOOKS], ids=name_of)
def test_examples_run(path, errors_of_pages):
    assert not errors_of_pages[str(path)], errors_of_pages[str(path)]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_of_docstrings_run(name, errors_of_docstrings):
    assert not errors_of_docstrings[name], errors_of_docstrings[name]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_have_examples(name):
    assert ">>>" in (documented(name)[0].__doc__ or "")


def test_few_examples_of_docstrings_are_not_run():
    assert len([name for name in DOCUMENTED if "+SKIP" in (documented(name)[0].__doc__ or "")]) <= 2


def test_every_notebook_shows_what_it_draws():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        drawn = [
            out["data"]["image/png"] for cell in cells for out in cell["outputs"] if "image/png" in out.get("data", {})
        ]
        assert drawn and all(cell["execution_count"] for cell in cells)


@pytest.mark.parametrize("page", sorted((DOCS / "transcripts").glob("[a-z]*.md")), ids=name_of)
def test_transcripts_take_ten_lines(page):
    code = "".join(snippet.code for snippet in SNIPPETS[page])
    assert 0 < len([line for line in code.splitlines() if line]) <= 10


@pytest.mark.parametrize("page", [*DOCS.glob("adding-*.md"), *(DOCS / "concepts").glob("*.md")], ids=name_of)
def test_pages_that_explain_have_examples(page):
    assert SNIPPETS[page]


def test_the_readme_is_short_and_its_figures_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert readme.speed() in text and readme.quality() in text
