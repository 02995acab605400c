"""Families known by name: found by the Auto classes in any order of imports, and derived when they are asked for."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import sparse_hf
from sparse_hf.models.dense_families import DENSE_FAMILIES, OTHER_FAMILIES
from sparse_hf.registry import ENTRIES, entry_of_class
from tests.models.families import dense_model
from tests.processes import printed

PACKAGE = Path(sparse_hf.__file__).parent


@pytest.mark.parametrize(
    "first",
    [
        "import importlib.util, sparse_hf; importlib.util.find_spec('transformers.models.auto.configuration_auto')",
        "import importlib, sparse_hf; from transformers import LlamaForCausalLM; importlib.reload(sparse_hf)",
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import sparse_hf",
    ],
)
def test_auto_classes_find_a_family_and_derive_no_other(first):
    code = f"""
import sys
{first}
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
tiny = dict(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=9,
            pattern="window(3, 0)")
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("sparse_llama", **tiny))
print(type(model).__name__, *sparse_hf.FAMILIES.derived())
assert type(model) is sparse_hf.SparseLlamaForCausalLM and "sparse_t5" in CONFIG_MAPPING and "sparse_t5" in list(CONFIG_MAPPING)
assert not any("sparse_hf.registry" in str(type(finder)) for finder in sys.meta_path)
"""
    assert printed(code) == "SparseLlamaForCausalLM llama"


def test_what_others_register_stays():
    code = """
from transformers import AutoConfig, BertConfig
class OneConfig(BertConfig): model_type = "one"
class TwoConfig(BertConfig): model_type = "two"
AutoConfig.register("one", OneConfig)
import sparse_hf
AutoConfig.register("two", TwoConfig)
from transformers import CONFIG_MAPPING
found = dict(CONFIG_MAPPING._extra_content)
print(found["one"].__name__, found["two"].__name__, len(found) - len(sparse_hf.registry.ENTRIES), found["sparse_bert"].__name__)
"""
    assert printed(code) == "OneConfig TwoConfig 2 SparseBertConfig"


def test_every_file_that_registers_a_family_is_in_the_table():
    models = PACKAGE / "models"
    texts = {
        ".".join(path.relative_to(models).with_suffix("").parts): path.read_text() for path in models.rglob("*.py")
    }
    files = {
        f"sparse_hf.models.{name}"
        for name, text in texts.items()
        if re.search(r"(?<!>>> )register_family\(\s*Sparse", text)
    }
    assert files == {entry.module for entry in OTHER_FAMILIES}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.dense_type)
def test_entries_are_what_is_derived(entry):
    family = sparse_hf.FAMILIES[entry.dense_type]
    assert (family.dense_type, family.sparse_type) == (entry.dense_type, entry.sparse_type)
    assert CONFIG_MAPPING[entry.sparse_type] is family.config_class
    assert all(entry_of_class(name) is entry for name in family.names)
    module = importlib.import_module(entry.module)
    for made in (family.config_class, *family.classes):
        assert made.__module__ == entry.module and getattr(module, made.__name__) is made
        assert pickle.loads(pickle.dumps(made)) is made
        assert Path(inspect.getsourcefile(made)) == Path(module.__file__)


@pytest.mark.parametrize("row", DENSE_FAMILIES, ids=lambda row: row.dense_type)
def test_rows_derive_what_a_class_statement_would(row):
    family = sparse_hf.FAMILIES[row.dense_type]
    dense = family.dense_config_class

    class Written(family.config_class.__bases__[0], dense):
        model_type = row.sparse_type

    made = family.config_class
    assert dense.__module__.startswith("transformers.models.") and row.source in made.__doc__
    assert inspect.signature(made) == inspect.signature(Written)
    assert [(f.name, f.type) for f in dataclasses.fields(made)] == [
        (f.name, f.type) for f in dataclasses.fields(Written)
    ]
    written, config = Written().to_dict(), made().to_dict()
    assert config == written and config["model_type"] == f"sparse_{row.dense_type}".replace("-", "_")


def test_pickles_load_where_nothing_is_imported(tmp_path):
    model = sparse_hf.sparsify(dense_model("BartModel"), "window(4, 4)", layers="decoder=window(8, 0)")
    torch.save(model, tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import sparse_hf
assert type(model) is sparse_hf.SparseBartModel and type(model.config) is sparse_hf.SparseBartConfig
print(type(model.encoder).__name__, *sparse_hf.FAMILIES.derived())
"""
    assert printed(code) == "SparseBartEncoder bart"


def test_threads_derive_a_family_once():
    # Transformers' own lazy imports are not safe for threads: what they would import is there before
    code = """
import threading, sparse_hf
import transformers.models.bert.modeling_bert, transformers.models.llama.modeling_llama, transformers.models.t5.modeling_t5
from transformers import BertConfig, LlamaConfig, T5Config
names = ["SparseLlamaConfig", "SparseLlamaModel", "SparseBertModel", "SparseBertConfig", "SparseT5Model"] * 4
found, gate = [], threading.Barrier(len(names))
def ask(name):
    gate.wait()
    found.append((name, getattr(sparse_hf, name)))
threads = [threading.Thread(target=ask, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(found)), *sorted(sparse_hf.FAMILIES.derived()))
"""
    assert printed(code) == "20 5 bert llama t5"


@pytest.mark.parametrize("head", ["LlamaModel", "MixtralForCausalLM", "Qwen3MoeModel", "BertModel", "T5Model"])
def test_what_transformers_reads_off_a_source_file_is_that_of_the_dense_class(head):
    # it searches the source of the class's module for words of the attention and experts interfaces
    sparse, dense = getattr(sparse_hf, f"Sparse{head}"), getattr(transformers, head)
    assert sparse._can_set_attn_implementation()
    assert sparse._can_set_experts_implementation() == dense._can_set_experts_implementation()
    assert sparse._can_set_experts_implementation() == (head.startswith(("Mixtral", "Qwen3Moe")))


def test_names_of_the_package():
    models = set(sparse_hf.models.__all__)
    assert set(sparse_hf.models.PUBLIC) <= models and {"SparseQwen3MoeForCausalLM", "SparseQwen3Model"} <= models
    assert {*models, *sparse_hf.pattern.__all__, "sparse_attention", "convert", "build_plan", "BlockPlan"} < set(
        dir(sparse_hf)
    )
    for name in sparse_hf.__all__:
        assert getattr(sparse_hf, name) is not None
    assert sparse_hf.convert is sparse_hf.conversion.convert and set(sparse_hf.models.__all__) <= set(
        dir(sparse_hf.models)
    )


@pytest.mark.parametrize("name", ["nothing", "SparseNothing", "SparseBertForNothing", "__nothing__", "seam"])
def test_unknown_names_are_no_attributes(name):
    with pytest.raises(AttributeError, match=name):
        getattr(sparse_hf, name)
