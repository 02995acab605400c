"""What mkdocs asks: the pages of the site, which are files of the repository under their own paths, and how they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# pages, and what pages link to
SHOWN = ("*.md", "*.cff", "LICENSE", "docs/**/*", "examples/**/*", "findings/*", "model_cards/*", ".github/**/*.md")
HIDDEN = {"__pycache__", ".ipynb_checkpoints"}
CODE = re.compile(r"`[^`\n]+`")


def on_files(files: Files, config) -> Files:
    """The repository's own tree, so that links lead to the same files there and here."""
    paths = sorted({path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()})
    names = [path.relative_to(ROOT).as_posix() for path in paths if not HIDDEN & set(path.parts)]
    own = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    notebooks = [_page_of(file, config) for file in own if file.src_uri.endswith(".ipynb")]
    # the theme's own files are known by paths below its folder
    return Files([*own, *notebooks, *(file for file in files if file.src_dir != config.docs_dir)])


def _page_of(file: File, config) -> File:
    """A notebook as a page beside it."""
    cells = json.loads((ROOT / file.src_uri).read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join(_markdown(cell) for cell in cells)
    return File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=text)


def _markdown(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    said = "".join("".join(output.get("text", [])) for output in cell["outputs"])
    pictures = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
    shown = "".join(
        f"\n\n![what the cell draws](data:image/png;base64,{''.join(picture).strip()})" for picture in pictures
    )
    return f"```python\n{source}\n```" + (f"\n\n```text\n{said}```" if said else "") + shown


def on_page_markdown(markdown: str, page, config, files) -> str:
    """A bar within code of a table is escaped there, and is not here."""
    lines = (
        CODE.sub(lambda found: found[0].replace(r"\|", "|"), line) if line.startswith("|") else line
        for line in markdown.splitlines()
    )
    return "\n".join(lines)
