"""What travels with the weights, through conversion and back: every file that is no weight and not written anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sparse_hf
from sparse_hf.conversion.export import export
from tests.models.families import dense_model

PATTERN = "window(7, 0)"
MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "heads/2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "path": "../outside", "type": "sentence_transformers.models.Normalize"},
]
GENERATE = "def generate(*args, **kwargs):\n    return 'by the code of the folder'\n"
# of a folder: what travels, beside the weights, and what does not
CARRIED = {
    "additional_chat_templates/tool_use.jinja": "TOOLS",
    "chat_template.jinja": "plain",
    "custom_generate/generate.py": GENERATE,
    "custom_generate/requirements.txt": "transformers",
    "custom_generate/README.md": "how it works",
    "LICENSE.txt": "of the model",
    "NOTICE": "of its makers",
    "USE_POLICY.md": "what for",
    "preprocessor_config.json": json.dumps({"image_processor_type": "ViTImageProcessor"}),
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "tokenization_own.py": "# a tokenizer's own code",
    "sentence_bert_config.json": json.dumps({"max_seq_length": 64}),
    "modules.json": json.dumps(MODULES),
    "1_Pooling/config.json": json.dumps({"pooling_mode_mean_tokens": True}),
    "heads/2_Dense/config.json": "{}",
    "heads/2_Dense/model.safetensors": "weights of a module",
    "heads/2_Dense/pytorch_model.bin": "weights of a module",
    "examples/prompt.txt": "Write",
}
LEFT = {
    "README.md": "of the dense one",
    ".gitattributes": "*.bin",
    ".cache/huggingface/download/config.json.metadata": "x",
    "tf_model.h5": "x",
    "flax_model.msgpack": "x",
    "consolidated.00.pth": "x",
    "onnx/model.onnx": "x",
    "onnx/config.json": "{}",
    "openvino/openvino_model.xml": "x",
    "original/params.json": "{}",
    "checkpoint-500/trainer_state.json": "{}",
    "trainer_state.json": "{}",
    "optimizer.pt": "x",
    "training_args.bin": "x",
    "draft/config.json": "{}",
    "draft/vocab.txt": "another model's",
    "modeling_own.py": "# the model's own code",
    "conversion.json": "{}",
    "pattern.png": "x",
}


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def checkpoint(folder: Path) -> Path:
    dense_model("LlamaForCausalLM").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": ["owner/x--modeling_own.T", None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in (CARRIED | LEFT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "secret.txt").write_text("not of the checkpoint")
    return folder


@pytest.mark.parametrize("to", [None, "dense", "native"], ids=["convert", "export to dense", "export to native"])
def test_files_of_a_folder_travel(to, tmp_path):
    made = checkpoint(tmp_path / "dense")
    out, own = tmp_path / "sparse", {"config.json", "generation_config.json", "model.safetensors"}
    sparse_hf.convert(made, out, PATTERN, progress=False)
    ours = {"conversion.json", "conversion.txt", "modeling_sparse_hf.py"}
    assert written(out) == own | set(CARRIED) | ours
    if to is not None:
        export(out, tmp_path / "back", to, progress=False)
        assert written(tmp_path / "back") == own | set(CARRIED)
        out = tmp_path / "back"
    for name, content in CARRIED.items():
        assert (out / name).read_text() == content, name


def test_the_report_names_them(tmp_path):
    sparse_hf.convert(checkpoint(tmp_path / "dense"), tmp_path / "sparse", PATTERN, progress=False)
    report = json.loads((tmp_path / "sparse" / "conversion.json").read_text())
    assert set(report["carried"]) == {*CARRIED, "generation_config.json"}


def test_prompts_are_made_by_the_same_templates(tmp_path):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1", eos_token="w2")
    tokenizer.chat_template = {"default": "{{messages[0].content}}", "tool_use": "TOOLS {{messages[0].content}}"}
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, progress=False)
    export(tmp_path / "sparse", tmp_path / "native", "native", progress=False)
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    for given, prompt in ((tools, "TOOLS w5"), (None, "w5")):
        for name in ("dense", "sparse", "native"):
            loaded = AutoTokenizer.from_pretrained(tmp_path / name)
            said = loaded.apply_chat_template([{"role": "user", "content": "w5"}], tools=given, tokenize=False)
            assert said == prompt, name


def test_the_code_that_generates_travels(tmp_path):
    made = tmp_path / "dense"
    dense_model("LlamaForCausalLM").save_pretrained(made)
    (made / "custom_generate").mkdir()
    (made / "custom_generate" / "generate.py").write_text(GENERATE)
    sparse_hf.convert(made, tmp_path / "sparse", PATTERN, progress=False)
    for folder in (made, tmp_path / "sparse"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert model.generate(torch.ones(1, 3).long()) == "by the code of the folder"


def test_an_adapter_beside_the_weights_is_not_lost_in_silence(tmp_path, caplog):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "adapter_config.json").write_text("{}")
    (tmp_path / "dense" / "adapter_model.safetensors").write_text("")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, progress=False)
    assert "holds a PEFT adapter beside its weights, which does not travel" in caplog.text
    assert not {name for name in written(tmp_path / "sparse") if name.startswith("adapter")}


def test_modules_that_cannot_be_read_are_refused(tmp_path):
    dense_model("BertModel").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "modules.json").write_text("[{")
    with pytest.raises(ValueError, match="modules.json is not readable JSON"):
        sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
