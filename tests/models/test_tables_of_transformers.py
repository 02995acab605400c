"""Tables of Transformers and of libraries on it: each dense entry that matters has its sparse counterpart.

Looked at: Transformers' tables of class names (models, tokenizers, processors), losses by class name, the names of its own
module, checkpoints' renamings, AWQ's scales, the answers of its server; PEFT's modules and experts; the encoders of Sentence
Transformers; what lm-eval and TRL look up (by Transformers' tables).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.loss.loss_utils import LOSS_MAPPING

import sparse_hf
from sparse_hf.registry import ENTRIES
from tests.models.families import VOCABULARY, dense_model, one_head
from tests.processes import printed

AUTO = "transformers.models.auto"
PROCESSORS = (
    "tokenization_auto",
    "image_processing_auto",
    "video_processing_auto",
    "feature_extraction_auto",
    "processing_auto",
)
TYPES = {entry.dense_type: entry.sparse_type for entry in ENTRIES}


def tables(module: ModuleType, ending: str = "_MAPPING_NAMES") -> dict[str, dict]:
    found = {name: value for name, value in vars(module).items() if name.endswith(ending) and isinstance(value, dict)}
    # it lies beside the others, and ours are in `CONFIG_MAPPING` alone
    found.pop("CONFIG_MAPPING_NAMES", None)
    return found


def derived(name: str) -> ModuleType:
    """A module, with every family derived."""
    for entry in ENTRIES:
        assert sparse_hf.FAMILIES[entry.dense_type]
    return import_module(name)


def listed(found: str | tuple | None) -> tuple:
    return (found,) if isinstance(found, str) else tuple(found or ())


def test_models_are_known_by_type_and_by_class_name():
    module, seen = derived(f"{AUTO}.modeling_auto"), set()
    for name, table in tables(module).items():
        for dense_type, sparse_type in TYPES.items():
            known = sparse_hf.FAMILIES[dense_type].architectures
            wanted = [known[cls] for cls in listed(table.get(dense_type)) if cls in known]
            assert list(listed(table.get(sparse_type))) == wanted, (name, dense_type)
            seen |= {name} if wanted else set()
    assert {
        "MODEL_MAPPING_NAMES",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    } <= seen
    # what a class of ours is left out of, there is no class of ours for
    left_out = {
        (name, dense_type)
        for name, table in tables(module).items()
        for dense_type, sparse_type in TYPES.items()
        if dense_type in table and sparse_type not in table
    }
    for name, dense_type in left_out:
        known = sparse_hf.FAMILIES[dense_type].architectures
        assert not set(listed(tables(module)[name][dense_type])) & set(known), (name, dense_type)


@pytest.mark.parametrize("module", PROCESSORS)
def test_tokenizers_and_processors_are_those_of_the_dense_family(module):
    tables_of = derived(f"{AUTO}.{module}")
    # tables beside them only help to build them
    found = {name: table for name, table in tables(tables_of).items() if hasattr(table, "_model_mapping")}
    assert found
    for name, table in found.items():
        by_config = table._model_mapping
        for dense_type, sparse_type in TYPES.items():
            family = sparse_hf.FAMILIES[dense_type]
            assert (dense_type in table) == (sparse_type in table), (name, dense_type)
            assert table.get(dense_type) == table.get(sparse_type)
            assert (family.dense_config_class in by_config) == (family.config_class in by_config), (name, dense_type)
            if module == "tokenization_auto" and table.get(dense_type):
                assert by_config[family.config_class] is by_config[family.dense_config_class]
    misdeclared = getattr(tables_of, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    assert {t for t in TYPES if t in misdeclared} == {t for t, sparse in TYPES.items() if sparse in misdeclared}


def test_class_names_of_tokenizers_are_found_as_before():
    """Transformers looks for a class in the module of each type that names it: a sparse type has the dense one's."""
    module = derived(f"{AUTO}.tokenization_auto")
    names = {name for name in module.TOKENIZER_MAPPING_NAMES.values() if name}
    found = {name: module.tokenizer_class_from_name(name) for name in sorted(names)}
    code = f"""
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
for name in {sorted(names)!r}:
    found = tokenizer_class_from_name(name)
    print("FOUND", name, None if found is None else found.__name__)
"""
    stock = dict(line.split()[1:] for line in printed(code).splitlines() if line.startswith("FOUND"))
    assert stock == {name: str(None if made is None else made.__name__) for name, made in found.items()}
    assert module.tokenizer_class_from_name("NoSuchTokenizer") is None


def test_the_names_of_configurations_are_left_alone():
    for module in ("modeling_auto", *PROCESSORS):
        derived(f"{AUTO}.{module}")
    names = import_module(f"{AUTO}.configuration_auto").CONFIG_MAPPING_NAMES
    assert not [name for name in names if name.startswith("sparse_")]
    known = list(transformers.CONFIG_MAPPING)
    assert len(known) == len(set(known))


def test_losses_go_by_class_name():
    for entry in ENTRIES:
        for made in sparse_hf.FAMILIES[entry.dense_type].classes:
            dense = sparse_hf.dense_class(made).__name__
            assert dense not in LOSS_MAPPING and made.__name__ not in LOSS_MAPPING
            endings = [kind for kind in LOSS_MAPPING if kind in dense]
            assert endings == [kind for kind in LOSS_MAPPING if kind in made.__name__], dense


def test_classes_are_found_by_name_in_transformers():
    """As servers and TRL do: `getattr(transformers, config.architectures[0])`."""
    for entry in ENTRIES:
        family = sparse_hf.FAMILIES[entry.dense_type]
        for made in (family.config_class, *family.classes):
            assert getattr(transformers, made.__name__) is made
            assert getattr(sys.modules["transformers"], made.__name__) is made


def test_checkpoints_are_renamed_as_those_of_the_dense_family():
    for dense_type, sparse_type in TYPES.items():
        assert sparse_hf.FAMILIES[dense_type]
        renamed = [get_checkpoint_conversion_mapping(kind) for kind in (dense_type, sparse_type)]
        assert (renamed[0] is None) == (renamed[1] is None), dense_type
        assert [type(t) for t in renamed[0] or ()] == [type(t) for t in renamed[1] or ()], dense_type


@pytest.mark.parametrize(
    ("module", "table"),
    [
        ("transformers.integrations.awq", "AWQ_SCALES_MAPPINGS"),
        ("peft.utils.transformers_weight_conversion", "_MODEL_TO_CONVERSION_PATTERN"),
    ],
)
def test_tables_by_model_type(module, table):
    pytest.importorskip(module.split(".")[0])
    found = getattr(derived(module), table)
    inside = {dense_type for dense_type in TYPES if dense_type in found}
    assert inside and inside == {dense_type for dense_type, sparse_type in TYPES.items() if sparse_type in found}
    assert all(found[dense_type] == found[TYPES[dense_type]] for dense_type in inside)


def test_modules_that_peft_adapts():
    pytest.importorskip("peft")
    found = tables(derived("peft.utils.constants"), "_MAPPING")
    assert len(found) > 10
    for name, table in found.items():
        for dense_type, sparse_type in TYPES.items():
            assert table.get(dense_type) == table.get(sparse_type), (name, dense_type)


def test_encoders_of_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    table = derived("sentence_transformers.base.modules.transformer")._ENCODER_ONLY_MODELS
    for dense, name in (("t5", "SparseT5EncoderModel"), ("pegasus", "SparsePegasusEncoder")):
        family = sparse_hf.FAMILIES[dense]
        for config_class, wanted in (
            (family.config_class, name),
            (family.dense_config_class, name.removeprefix("Sparse")),
        ):
            path, found = next((path, cls) for kind, path, cls in table if issubclass(config_class, kind))
            assert found == wanted and getattr(import_module(path), found).__name__ == wanted


def test_answers_of_the_server_are_read_alike():
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip("transformers serve needs fastapi")
    table = derived("transformers.cli.serving.utils")._RESPONSE_TEMPLATE_FALLBACKS

    def template(model_type: str):
        return next((value for types, value in table.items() if model_type in types), None)

    assert template("sparse_qwen3") is not None
    assert all(template(dense_type) is template(sparse_type) for dense_type, sparse_type in TYPES.items())


@pytest.mark.parametrize("first", ["sparse_hf", "peft"])
def test_tables_of_libraries_are_entered_in_either_order(first):
    """Whoever comes first, and without importing a library that the user does not."""
    pytest.importorskip("peft")
    last = {"sparse_hf": "peft", "peft": "sparse_hf"}[first]
    code = f"""
import sys, {first}
if {first!r} == "sparse_hf":
    sparse_hf.FAMILIES["mixtral"]
    assert "peft" not in sys.modules
import {last}, sparse_hf, peft.utils.constants, peft.utils.transformers_weight_conversion as experts
sparse_hf.FAMILIES["mixtral"]
print(peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["sparse_mixtral"],
      experts._MODEL_TO_CONVERSION_PATTERN["sparse_mixtral"])
"""
    assert printed(code).splitlines()[-1] == "['q_proj', 'v_proj'] mixtral"


# --- what follows from the tables ---


@pytest.mark.parametrize("head", one_head(generating=True))
def test_label_smoothing_shifts_as_for_the_dense_model(head, tmp_path):
    """Trainer knows by a class's name whose labels to shift: those of decoders, and of no encoder-decoder."""
    dense = dense_model(head)
    if "encoder" in sparse_hf.FAMILIES[dense.config.model_type].config_class(**dense.config.to_diff_dict()).stacks:
        sparse = sparse_hf.sparsify(dense, "window(None, None)", layers="decoder=dense")
    else:
        sparse = sparse_hf.sparsify(dense, "window(None, None)")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if dense.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.roll(1, dims=1)
    with torch.no_grad():
        losses = [float(Trainer(model=m.eval(), args=arguments).compute_loss(m, dict(batch))) for m in (dense, sparse)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
