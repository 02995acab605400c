"""A sparse checkpoint loads after `import sparse_hf`, with `trust_remote_code=True`, and else says what it needs."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import sparse_hf
from sparse_hf.models.hf.remote_code import MODULE, auto_map
from sparse_hf.version import HOW_TO_INSTALL
from tests.fresh import fresh
from tests.models.families import HEADS, TINY, dense_model, inputs, pattern_layers, sparse_class

FAMILIES = ("bert", "llama", "bart")
CHOSEN = [head for head, family in HEADS.items() if family in FAMILIES]
# in a process of its own: every checkpoint by its Auto class, and what it answers
LOADS = """
import json, sys
from pathlib import Path
import torch, transformers
if {imported}:
    import sparse_hf
assert ("sparse_hf" in sys.modules) is {imported}
for head, auto in json.loads(sys.argv[1]).items():
    folder = Path(head)
    found, told = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **{options})
    assert type(found).__name__ == "Sparse" + head, (auto, type(found))
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    batch, wanted = torch.load(folder / "answers.pt")
    with torch.no_grad():
        answers = found.eval()(**batch)
    for name, value in wanted.items():
        torch.testing.assert_close(answers[name], value)
    # once more from what the loaded model writes, which holds nothing but what the first one held
    found.save_pretrained(folder / "again")
    written = {{p.name for p in (folder / "again").iterdir()}}
    assert written <= {{p.name for p in folder.iterdir()}}, written
    first, again = (json.loads((f / "config.json").read_text()) for f in (folder, folder / "again"))
    assert first["auto_map"] == again["auto_map"] and first["sparse_attention"] == again["sparse_attention"]
    getattr(transformers, auto).from_pretrained(folder / "again", **{options})
print("all loaded")
"""
FAILS = """
import sys
import transformers
assert "sparse_hf" not in sys.modules
for options in ({"trust_remote_code": False}, {}):
    try:
        transformers.AutoModel.from_pretrained("LlamaModel", **options)
    except ValueError as error:
        print(error)

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sparse_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
try:
    transformers.AutoModel.from_pretrained("LlamaModel", trust_remote_code=True)
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for head in CHOSEN:
        dense, batch = dense_model(head), inputs(head)
        sparse = sparse_hf.sparsify(dense, "window(16, 16) | first(1)", **pattern_layers(head)).eval()
        sparse.save_pretrained(folder / head)
        with torch.no_grad():
            answers = {k: v for k, v in sparse(**batch).items() if isinstance(v, torch.Tensor)}
        torch.save((batch, answers), folder / head / "answers.pt")
    return folder


def run(code: str, checkpoints: Path, *arguments: str) -> str:
    # code that trust_remote_code copies goes to a folder of the test's own
    own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(checkpoints / "modules")}
    status, said = fresh(code, *arguments, cwd=checkpoints, environment=own)
    assert status == 0, said
    return said


@pytest.mark.parametrize("imported", [True, False], ids=["import sparse_hf", "trust_remote_code"])
def test_loads_and_answers_the_same(imported, checkpoints):
    autos = {}
    for head in CHOSEN:
        named = auto_map(sparse_class(head).config_class())
        autos[head] = next(auto for auto, name in named.items() if name == f"{MODULE}.Sparse{head}")
    options = {} if imported else {"trust_remote_code": True}
    said = run(LOADS.format(imported=imported, options=options), checkpoints, json.dumps(autos))
    assert "all loaded" in said


def test_says_what_it_needs(checkpoints):
    said = run(FAILS, checkpoints)
    # the file that it asks to look at says `import sparse_hf`
    assert "LlamaModel contains custom code" in said
    assert said.count("Please pass the argument `trust_remote_code=True`") == 2
    # and not Transformers' advice to install what an index has under this name
    assert HOW_TO_INSTALL in said and "pip install sparse_hf" not in said
    assert "`import sparse_hf`" in (checkpoints / "LlamaModel" / f"{MODULE}.py").read_text()


@pytest.mark.parametrize("family", TINY)
def test_every_head_is_named_in_the_file_and_the_map(family, tmp_path):
    config = sparse_hf.FAMILIES[family].config_class(**TINY[family])
    config.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", f"{MODULE}.py"}
    names = [c.__name__ for c in sparse_hf.FAMILIES[family].classes]
    exec((tmp_path / f"{MODULE}.py").read_text(), content := {})
    for name in (type(config).__name__, *names):
        assert content[name] is getattr(sparse_hf, name) and name in content["__all__"]
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {f"{MODULE}.{name}" for name in (type(config).__name__, *names)} == set(written.values())
    ast.parse((tmp_path / f"{MODULE}.py").read_text())


def test_an_auto_class_with_several_heads_gives_the_first():
    assert auto_map(sparse_hf.SparseBertConfig())["AutoModelForPreTraining"] == f"{MODULE}.SparseBertForPreTraining"
    assert auto_map(sparse_hf.SparseLlamaConfig())["AutoConfig"] == f"{MODULE}.SparseLlamaConfig"


def test_another_pattern_starts_without_the_map(tmp_path):
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(16, 0)")
    sparse.save_pretrained(tmp_path / "sparse")
    written = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert "auto_map" in written
    assert "auto_map" not in vars(sparse_hf.SparseLlamaConfig.from_dense(written, "first(1)"))
