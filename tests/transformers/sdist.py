"""Transformers' own common model tests: `tests/` of the installed version's sdist, fetched and never committed.

They are unpacked as a package of another name, for our repository has a `tests` too; they import each other relatively.
The sdist carries only `tests/test_*.py`. What these import from sub-folders is not there, and gets a stand-in of ours
(`standins.py`).
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

from examples.assets import CACHE

PACKAGE = "transformers_tests"
SHA256 = {
    "5.17.0": "a153be279169b55b92d8000bf4af294aed684503d091cca7804da2dd8a9de000",
    "5.24.0": "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3",
}
# the modules of mixins that we run
MODULES = (
    "test_configuration_common",
    "test_fsdp_mixin",
    "test_modeling_common",
    "test_pipeline_mixin",
    "test_tensor_parallel_mixin",
    "test_training_mixin",
)


def install() -> None:
    """Make `transformers_tests` importable, here and in the processes started from here."""
    folder = str(fetch(transformers.__version__))
    if folder not in sys.path:
        sys.path.append(folder)


def marks() -> set[str]:
    """The pytest marks that the tests carry."""
    folder = fetch(transformers.__version__) / PACKAGE
    sources = [*folder.glob("test_*.py"), Path(transformers.__file__).with_name("testing_utils.py")]
    return {name for path in sources for name in re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))}


def fetch(version: str) -> Path:
    """The folder that holds the package of a version's tests; fetched, checked and unpacked on first use.

    Raises:
        RuntimeError: a version without a pinned hash, or an archive that cannot be fetched or is another one.
    """
    folder = CACHE / f"transformers-tests-{version}"
    if folder.is_dir():
        return folder
    if version not in SHA256:
        raise RuntimeError(
            f"no sha256 is pinned for the sdist of transformers {version}, only for {', '.join(SHA256)}; install one of "
            f"these, or add the hash to SHA256 in {__file__}"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        archive = _download(version, Path(scratch))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256[version]:
            raise RuntimeError(f"the sdist of transformers {version} has sha256 {found}; {SHA256[version]} is pinned")
        unpacked = Path(scratch) / "unpacked"
        _unpack(archive, unpacked / PACKAGE)
        _complete(unpacked)
        try:
            os.rename(unpacked, folder)
        except OSError:
            # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _download(version: str, into: Path) -> Path:
    print(f"fetching the sdist of transformers {version} ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", "."]
    done = subprocess.run([*command, f"transformers=={version}"], cwd=into, capture_output=True, text=True)
    archives = list(into.glob("transformers-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"could not fetch the sdist of transformers {version}: {last}")
    return archives[0]


def _unpack(archive: Path, into: Path) -> None:
    # only the modules named here are written, under names of ours
    into.mkdir(parents=True)
    with tarfile.open(archive) as package:
        top = archive.name.removesuffix(".tar.gz")
        for module in MODULES:
            with (
                package.extractfile(f"{top}/tests/{module}.py") as source,
                (into / f"{module}.py").open("wb") as target,
            ):
                shutil.copyfileobj(source, target)


def _complete(unpacked: Path) -> None:
    """Write what the modules look for and the sdist does not carry."""
    package = unpacked / PACKAGE
    (package / "__init__.py").touch()
    # the modules execute the `__init__` of the sources beside them, and then take the installed transformers
    sources = unpacked / "src" / "transformers"
    sources.mkdir(parents=True)
    (sources / "__init__.py").touch()
    for module, names in _missing(package).items():
        path = package.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        lines = [f"{name} = stand_in({name!r})" for name in sorted(names)]
        path.write_text("\n".join(["from tests.transformers.standins import stand_in", *lines, ""]), encoding="utf-8")


def _missing(package: Path) -> dict[str, set[str]]:
    """Relative module -> names that the unpacked modules import from it, where there is no such module."""
    missing: dict[str, set[str]] = {}
    for source in package.glob("test_*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and not (package / f"{node.module}.py").is_file():
                missing.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return missing
