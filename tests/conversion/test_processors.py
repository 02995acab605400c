"""The class that reads a folder's tokenizer: as of the source, whoever loads it; and how many tokens it gives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoImageProcessor, AutoTokenizer

import sparse_hf
from sparse_hf.conversion import describe_conversion
from sparse_hf.conversion.carry import TOKENIZER_CONFIG, carry
from sparse_hf.conversion.export import export
from sparse_hf.conversion.processors import declare_classes, tokenizer_class
from sparse_hf.registry import ENTRIES
from tests.crosses import sampled
from tests.fresh import fresh
from tests.models.families import dense_model
from tests.models.perceivers import stock_model

PATTERN = "window(7, 0)"
TEXTS = ("Hello World", " two  spaces", "[INST] What is this? [/INST] Hello</s>[INST] Hello [/INST]", "a\nb")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
SIZE = 300


def sentencepiece_like() -> Tokenizer:
    """As `tokenizer.json` of the generation of Llama 2, Mistral 7B and Phi-3: a space is put before the text."""
    rules = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rules.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return trained(rules, ["Hello▁World▁[INST]▁What▁is▁this?▁[/INST]"])


def byte_level() -> Tokenizer:
    """As of GPT-2, Llama 3 and Qwen."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    return trained(rules, ["Hello World 2023 [INST] What is this? [/INST]"])


def unigram() -> Tokenizer:
    """As of T5, XLM-R, Pegasus and ALBERT."""
    rules = Tokenizer(models.Unigram())
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    rules.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=special, unk_token="<unk>", show_progress=False)
    rules.train_from_iterator(["Hello World [INST] What is this? [/INST]"] * 20, trainer)
    return rules


def trained(rules: Tokenizer, texts: list[str]) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    rules.train_from_iterator(
        texts * 20, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False)
    )
    return rules


RULES = {"sentencepiece": sentencepiece_like, "bytes": byte_level, "unigram": unigram}


def write_tokenizer(folder: Path, rules: str, declared: str | None, **settings) -> None:
    """`rules` is what `tokenizer.json` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(rules)
    named = {} if declared is None else {"tokenizer_class": declared}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps({**SPECIAL, **settings, **named}))


def write_config(folder: Path, model_type: str, **values) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": None, **values}))


def read(folder: Path) -> list:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [type(tokenizer).__name__, *(tokenizer(text).input_ids for text in TEXTS)]


def read_where_nothing_is_imported(folders: list[Path]) -> list:
    """What `read` gives in an interpreter that knows no sparse model type."""
    code = f"""
import json, sys, transformers
transformers.logging.set_verbosity_error()
from transformers import AutoImageProcessor, AutoTokenizer
for folder in {[str(folder) for folder in folders]!r}:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print("\\nREAD", json.dumps([type(tokenizer).__name__, *(tokenizer(text).input_ids for text in {TEXTS!r})]))
assert "sparse_hf" not in sys.modules
"""
    status, said = fresh(code)
    assert status == 0, said
    return [json.loads(line.removeprefix("READ ")) for line in said.splitlines() if line.startswith("READ ")]


# what folders of the hub declare, for one family or another
DECLARED = (
    None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2TokenizerFast",
    "TokenizersBackend",
)  # fmt: skip


# every family meets every class with one of the rules, and `make test` runs one part
@pytest.fixture(scope="module", params=sampled([0], range(len(RULES))))
def folders(request, tmp_path_factory) -> dict[tuple, tuple[Path, list]]:
    """(family, class declared, rules) -> the folder as converted, and what the dense one gives."""
    made = {}
    texts = {name: rules().to_str() for name, rules in RULES.items()}
    for (i, entry), (j, declared), (k, rules) in itertools.product(*map(enumerate, (ENTRIES, DECLARED, RULES))):
        if (i + j + k) % len(RULES) != request.param:
            continue
        dense, sparse = (tmp_path_factory.mktemp(f"{entry.dense_type}-{kind}") for kind in ("dense", "sparse"))
        write_tokenizer(dense, texts[rules], declared)
        write_config(dense, entry.dense_type)
        files = [dense / "tokenizer.json", dense / TOKENIZER_CONFIG]
        found = tokenizer_class(dense, entry.dense_type, files)
        # a class of another kind of vocabulary does not load for the dense folder either
        if found is not None:
            carry(files, dense, sparse)
            declare_classes(sparse, found, entry.dense_type)
            write_config(sparse, entry.sparse_type)
            made[entry.dense_type, declared, rules] = sparse, read(dense)
    return made


def test_every_family_keeps_its_class_and_its_ids(folders):
    assert {family for family, *_ in folders} == {entry.dense_type for entry in ENTRIES}
    for case, (folder, wanted) in folders.items():
        assert read(folder) == wanted, case


def test_every_family_keeps_them_where_nothing_is_imported(folders):
    # Llama's class, which nobody declares and which does not suit the rules: if it were declared, Transformers would not take it
    cases = [
        case for case, (_, wanted) in folders.items() if (wanted[0], *case[1:]) != ("LlamaTokenizer", None, "bytes")
    ]
    found = read_where_nothing_is_imported([folders[case][0] for case in cases])
    for case, got in zip(cases, found, strict=True):
        assert got == folders[case][1], case


def test_conversion_and_export_declare_the_class(tmp_path):
    found = {}
    for head in ("MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM", "BertForMaskedLM"):
        dense, sparse, again, back = (tmp_path / head / name for name in ("dense", "sparse", "again", "back"))
        write_tokenizer(dense, sentencepiece_like().to_str(), "LlamaTokenizer")
        dense_model(head).save_pretrained(dense)
        wanted = read(dense)
        sparse_hf.convert(dense, sparse, PATTERN, progress=False)
        sparse_hf.convert(sparse, again, "window(3, 0)", progress=False)
        export(again, back, "dense", progress=False)
        assert [read(folder) for folder in (sparse, again, back)] == [wanted] * 3
        told, taken = describe_conversion(dense, PATTERN), wanted[0]
        assert told["tokenizer_class"] == (None if taken == "LlamaTokenizer" else ["LlamaTokenizer", taken])
        said = f"Tokenizer's class: {taken}, which Transformers takes for {told['family']}; the source names LlamaTokenizer"
        assert (said in (sparse / "conversion.txt").read_text()) == (taken != "LlamaTokenizer")
        found |= dict.fromkeys((sparse, again, back), wanted)
    assert read_where_nothing_is_imported(list(found)) == list(found.values())
    assert {wanted[0] for wanted in found.values()} >= {"TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizer"}


def test_rules_that_are_mended_when_read_stay_mended(tmp_path):
    """Old checkpoints of Mistral ask for it in their settings, and are known by model type, version and size."""
    rules = json.loads(byte_level().to_str())
    rules["model"]["vocab"] |= {f"word{i}": SIZE + i for i in range(100_001)}
    write_tokenizer(tmp_path / "dense", json.dumps(rules), "PreTrainedTokenizerFast", fix_mistral_regex=True)
    dense_model("MistralForCausalLM").save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "transformers_version": "4.50.0"}))
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, progress=False)
    write_tokenizer(tmp_path / "plain", json.dumps(rules), "PreTrainedTokenizerFast")
    write_config(tmp_path / "plain", "mistral", transformers_version=transformers.__version__)
    split = [AutoTokenizer.from_pretrained(tmp_path / name).tokenize(" 2023") for name in ("dense", "sparse", "plain")]
    assert split[0] == split[1] != split[2]


def test_a_tokenizer_that_is_code_or_does_not_load_travels_as_it_is(tmp_path, caplog):
    for name, settings in (("code", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}), ("broken", {})):
        dense_model("LlamaForCausalLM").save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, byte_level().to_str(), "OwnTokenizer", **settings)
        if name == "broken":
            (tmp_path / name / "tokenizer.json").write_text('{"model": {"type": "None"}}')
        sparse_hf.convert(tmp_path / name, tmp_path / f"{name}-out", PATTERN, progress=False)
        for file in ("tokenizer.json", TOKENIZER_CONFIG):
            assert (tmp_path / f"{name}-out" / file).read_text() == (tmp_path / name / file).read_text()
        assert ("does not load" in caplog.text) == (name == "broken")


# those with a table of positions: what has rotary or relative ones goes on beyond it
LIMITS = {"RobertaModel": 512, "BertModel": 512, "GPT2Model": 512, "OPTModel": 512, "BartModel": 512}


@pytest.mark.parametrize(("head", "limit"), [*LIMITS.items(), ("LlamaModel", None), ("T5Model", None)])
@pytest.mark.parametrize("old", [None, 100, 514, int(1e30)])
def test_a_tokenizer_gives_no_more_tokens_than_there_are_positions(head, limit, old, tmp_path):
    dense_model(head).save_pretrained(tmp_path / "dense")
    rules = unigram() if head == "T5Model" else byte_level()
    write_tokenizer(tmp_path / "dense", rules.to_str(), None, **({} if old is None else {"model_max_length": old}))
    settings = tmp_path / "dense" / "sentence_roberta_config.json"
    settings.write_text(json.dumps({"max_seq_length": old}))
    stacks = {"layers": "decoder=window(7, 0)"} if head in ("BartModel", "T5Model") else {}
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "window(7, 7)", progress=False, **stacks)
    expected = old if limit is None else min(limit, old or limit)
    found = AutoTokenizer.from_pretrained(tmp_path / "sparse").model_max_length
    assert found == (expected or int(1e30))
    sentences = json.loads((tmp_path / "sparse" / settings.name).read_text())["max_seq_length"]
    assert sentences == (None if old is None else expected)
    report = json.loads((tmp_path / "sparse" / "conversion.json").read_text())
    assert report["tokenizer_max_length"] == [old, expected]


def test_a_tokenizer_without_settings_gets_a_limit(tmp_path):
    dense_model("RobertaModel", max_position_embeddings=130).save_pretrained(tmp_path / "dense")
    byte_level().save(str(tmp_path / "dense" / "tokenizer.json"))
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "window(7, 7)", progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse").model_max_length == 128
    assert "Tokenizer's limit: none -> 128" in (tmp_path / "sparse" / "conversion.txt").read_text()


def test_images_are_read_by_the_class_of_the_source(tmp_path):
    """Perceiver is the one family with images; folders of the hub name its class in one of three ways."""
    pytest.importorskip("PIL")
    if Version(transformers.__version__) < Version("5.24"):
        pytest.importorskip("torchvision", reason="older versions of Transformers read images with torchvision alone")
    dense, folders = stock_model("PerceiverForImageClassificationLearned"), []
    for key in (None, "feature_extractor_type", "image_processor_type"):
        source = tmp_path / f"{key}-dense"
        dense.save_pretrained(source)
        named = {} if key is None else {key: f"Perceiver{'ImageProcessor' if 'image' in key else 'FeatureExtractor'}"}
        (source / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 7, "width": 7}, **named}))
        folders += [str(source), str(sparse_hf.convert(source, tmp_path / f"{key}-sparse", progress=False))]
    kinds = [type(AutoImageProcessor.from_pretrained(folder, backend="pil")).__name__ for folder in folders]
    code = f"""
from transformers import AutoImageProcessor
print("\\nREAD", *(type(AutoImageProcessor.from_pretrained(folder, backend="pil")).__name__ for folder in {folders!r}))
"""
    status, said = fresh(code)
    assert status == 0, said
    alone = next(line.split()[1:] for line in said.splitlines() if line.startswith("READ"))
    assert kinds == alone == ["PerceiverImageProcessorPil"] * 6
