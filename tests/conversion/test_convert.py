"""Conversion: what travels, what grows, and that nothing half-done is ever left to load."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sparse_hf
from sparse_hf.conversion import describe_conversion, report_text
from sparse_hf.conversion import folder as folder_module
from sparse_hf.conversion import weights as weights_module
from tests.models.families import HEADS, TINY, dense_model, family_and_kind, inputs

PATTERN = "window(16, 16) | first(1)"


@pytest.fixture
def bert(tmp_path) -> Path:
    dense_model("BertForMaskedLM", max_position_embeddings=160).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


def other_layers(head: str) -> str | None:
    """A second pattern for one layer, where the family can tell its layers apart."""
    stacks = sparse_hf.FAMILIES[HEADS[head]].config_class(**TINY[HEADS[head]]).stacks
    return None if HEADS[head] == "albert" else "encoder 1=dense" if "encoder" in stacks else "1=dense"


@pytest.mark.cross(by=family_and_kind)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_converts_and_answers_as_in_memory(head, tmp_path):
    dense, layers = dense_model(head), other_layers(head)
    dense.save_pretrained(tmp_path / "dense")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, layers=layers, progress=False)
    sparse = getattr(sparse_hf, f"Sparse{head}")
    loaded, told = sparse.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert loaded.config.architectures == [f"Sparse{head}"] and not told["missing_keys"] and not told["unexpected_keys"]
    batch = inputs(head)
    with torch.no_grad():
        wanted, found = sparse_hf.sparsify(dense, PATTERN, layers=layers)(**batch), loaded.eval()(**batch)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("shape", ["single", "sharded", "bin"])
def test_weights_keep_their_names_and_positions_are_tiled(shape, tmp_path):
    dense = dense_model("BertForMaskedLM", max_position_embeddings=160)
    source = tmp_path / "dense"
    dense.save_pretrained(source, max_shard_size="20KB" if shape == "sharded" else "1GB")
    if shape == "bin":
        torch.save(dense.state_dict(), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    before = dense.state_dict() if shape == "bin" else weights(source)
    sparse_hf.convert(source, tmp_path / "sparse", PATTERN, max_length=400, progress=False)
    after = weights(tmp_path / "sparse")
    assert after.keys() == before.keys()
    table = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(after[table], before[table][torch.arange(400) % 160])
    assert all(torch.equal(after[key], before[key]) for key in before if key != table)
    assert not list((tmp_path / "sparse").glob("*.bin"))
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse")
    assert model.config.max_position_embeddings == 400
    assert model(torch.ones(1, 390, dtype=torch.long)).logits.shape == (1, 390, 97)
    report = json.loads((tmp_path / "sparse" / "conversion.json").read_text())
    assert report["grown"] == {table: [[160, 32], [400, 32]]}


def test_tokenizer_and_generation_config_travel(tmp_path):
    dense = dense_model("LlamaForCausalLM")
    dense.generation_config.max_new_tokens = 7
    dense.save_pretrained(tmp_path / "dense")
    tokenizer = {"truncation": {"max_length": 512, "strategy": "LongestFirst"}, "model": {"type": "WordLevel"}}
    (tmp_path / "dense" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512, "pad_token": "x"}))
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", "sliding_window(64)", max_length=2048, progress=False)
    written = {
        name: json.loads((tmp_path / "sparse" / name).read_text())
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    assert written["tokenizer.json"]["truncation"]["max_length"] == 2048
    assert written["tokenizer_config.json"] == {"model_max_length": 2048, "pad_token": "x"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert loaded.generation_config.max_new_tokens == 7 and loaded.config.max_position_embeddings == 2048


def test_a_sparse_checkpoint_converts_again(bert, tmp_path):
    sparse_hf.convert(bert, tmp_path / "one", PATTERN, progress=False)
    sparse_hf.convert(tmp_path / "one", tmp_path / "two", "window(3, 3)", progress=False)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "two")
    assert config.sparse_attention["patterns"] == {"sparse": "window(3, 3)"}
    assert config.architectures == ["SparseBertForMaskedLM"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern": "windw(1, 1)"}, ValueError, "unknown word 'windw'"),
        ({"layers": "0-5=dense"}, ValueError, "'0-5' is outside the model, which has layers 0-1"),
        ({"layers": "0-1=dense, 1=first(1)"}, ValueError, "layer 1 twice"),
        ({"layers": "zero=dense"}, ValueError, "'zero' is not a layer or a range"),
        ({"layers": "0"}, ValueError, "write RANGE=PATTERN"),
        ({"layers": ["first(1)"]}, ValueError, "has 1 patterns; the model has 2 layers"),
        ({"pattern": "per_head(first(1), first(2))"}, ValueError, "names 2 patterns; the model has 4 heads"),
        ({"max_length": 100}, ValueError, "max_length is 100; the checkpoint has 160 positions"),
        ({"max_length": True}, ValueError, "it must be a number of tokens"),
        (
            {"source": "/nowhere/at/all"},
            FileNotFoundError,
            "is no folder with a checkpoint, no .gguf file and no hub id",
        ),
        ({"source": "/nowhere/model.gguf"}, FileNotFoundError, "does not exist; give a .gguf file"),
    ],
)
def test_bad_input_leaves_nothing(arguments, error, message, bert, tmp_path):
    given = {"source": bert, "pattern": PATTERN, **arguments}
    with pytest.raises(error, match=message):
        sparse_hf.convert(given.pop("source"), tmp_path / "out", given.pop("pattern"), progress=False, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no header":
        file.write_bytes(b"\x00" * 4)
    elif how == "no weights":
        file.unlink()
    elif how == "missing shard":
        file.unlink()
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "cut config":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": how}))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("cut", ValueError, "its header promises .* only half written"),
        ("no header", ValueError, "no readable header; the checkpoint was only half written"),
        ("no weights", FileNotFoundError, "has no weights: neither"),
        (
            "missing shard",
            FileNotFoundError,
            r"names \['model-00001-of-00002.safetensors'\], which are not in the folder",
        ),
        ("no config", FileNotFoundError, "has no config.json"),
        ("cut config", ValueError, "is not readable JSON"),
        (
            "fancy",
            ValueError,
            "'fancy' has no sparse counterpart: Transformers does not know it .* supported are albert",
        ),
        ("xlnet", ValueError, "'xlnet' has no sparse counterpart: it computes attention by itself"),
    ],
)
def test_a_damaged_source_is_refused_before_any_work(how, error, message, bert, tmp_path):
    damage(bert, how)
    with pytest.raises(error, match=message):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["itself", "parent", "grandparent", "inside", "link", "link to parent", "roundabout"])
def test_the_source_is_never_written_over(where, overwrite, tmp_path):
    source = tmp_path / "models" / "deep" / "bert"
    dense_model("BertForMaskedLM").save_pretrained(source)
    # so that nothing but its place speaks against the folder
    for folder in (source.parent, source.parent.parent):
        (folder / "config.json").write_text("{}")
    before = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    for link, target in (("link", source), ("link to parent", source.parent)):
        (tmp_path / link).symlink_to(target)
    out = {
        "itself": source,
        "parent": source.parent,
        "grandparent": source.parent.parent,
        "inside": source / "sparse",
        "roundabout": source / ".." / "bert",
    }.get(where, tmp_path / where)
    with pytest.raises(ValueError, match="give a folder elsewhere") as refused:
        sparse_hf.convert(source, out, PATTERN, overwrite=overwrite, progress=False)
    assert f"out is {out.resolve()} and source is {source}:" in str(refused.value)
    assert {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_replaces_checkpoints_only(bert, tmp_path):
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    (home / "letters" / "first.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds no config.json, so it is no checkpoint"):
        sparse_hf.convert(bert, home, PATTERN, overwrite=True, progress=False)
    assert (home / "letters" / "first.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    sparse_hf.convert(bert, tmp_path / "link", PATTERN, progress=False)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "config.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        sparse_hf.convert(bert, tmp_path / "file", PATTERN, overwrite=True, progress=False)


def change(folder: Path, **config) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(folder: Path, *words: str) -> None:
    """Leave tensors out of the checkpoint."""
    rewrite(folder, {name: t for name, t in weights(folder).items() if not any(word in name for word in words)})


SPARSE = {"patterns": {"sparse": "first(1)"}, "layers": ["sparse"] * 3}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change(f, hidden_size=64),
            r"embeddings.*weight is \[.*32\] and should be \[.*64\]; .* more\); take config",
        ),
        (lambda f: change(f, vocab_size=98), r"word_embeddings.weight is \[97, 32\] and should be \[98, 32\]"),
        (
            lambda f: change(f, max_position_embeddings=512),
            r"position_embeddings.weight is \[160, 32\] and should be \[512, 32\]",
        ),
        (
            lambda f: change(f, num_hidden_layers=3),
            r"layer.2.attention.* is missing; .* \(and 13 more\); name in config.json",
        ),
        (
            lambda f: without(f, "layer.1.output.dense.bias"),
            r"bert.encoder.layer.1.output.dense.bias \[32\] is missing",
        ),
        (lambda f: without(f, "cls."), r"do not fit BertForMaskedLM .* cls.predictions.bias \[97\] is missing"),
        (lambda f: change(f, sparse_attention=SPARSE), "sparse_attention.layers has 3 entries; the model has 2 layers"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(damage, message, kind, bert, tmp_path):
    damage(bert)
    if kind == "bin":
        torch.save(weights(bert), bert / "pytorch_model.bin")
        (bert / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    with pytest.raises(ValueError, match=message):
        describe_conversion(bert, PATTERN)
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


@pytest.mark.parametrize("old", ["no prefix", "prefix", "gamma", "extra", "untied", "no pooler"])
def test_weights_that_transformers_takes_are_taken(old, tmp_path):
    head = "BertModel" if old in ("no prefix", "prefix", "no pooler") else "BertForMaskedLM"
    dense = dense_model(head)
    dense.save_pretrained(tmp_path / "dense")
    tensors = weights(tmp_path / "dense")
    if old == "prefix":
        tensors = {f"bert.{name}": t for name, t in tensors.items()}
    elif old == "no pooler":
        tensors = {name: t for name, t in tensors.items() if "pooler" not in name}
    elif old == "gamma":
        tensors = {
            n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in tensors.items()
        }
    elif old == "extra":
        tensors["cls.seq_relationship.weight"] = torch.ones(2, 32)
    elif old == "untied":
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    rewrite(tmp_path / "dense", tensors)
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, progress=False)
    assert (tmp_path / "sparse" / "model.safetensors").read_bytes() == (
        tmp_path / "dense" / "model.safetensors"
    ).read_bytes()
    loaded = getattr(sparse_hf, f"Sparse{head}").from_pretrained(tmp_path / "sparse").eval()
    ids = torch.randint(3, 97, (1, 50))
    wanted, found = sparse_hf.sparsify(dense, PATTERN)(input_ids=ids)[0], loaded(input_ids=ids)[0]
    torch.testing.assert_close(found, wanted)


def test_packed_weights_of_quantised_checkpoints_are_not_compared(bert, tmp_path):
    change(bert, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    name = "bert.encoder.layer.0.output.dense.weight"
    rewrite(bert, {**weights(bert), name: torch.zeros(1024, 1, dtype=torch.uint8)})
    sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    assert weights(tmp_path / "out")[name].shape == (1024, 1)


def test_a_big_model_is_checked_without_memory(bert, tmp_path):
    # 70 billion parameters
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = transformers.LlamaConfig(**big, architectures=["LlamaForCausalLM"])
    config.save_pretrained(bert)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the weights do not fit LlamaForCausalLM of config.json: .*and 720 more"):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    # of 140 GB in 16 bits; the highest mark so far, in KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 20


def test_what_is_no_folder_of_a_checkpoint_is_refused(bert, tmp_path):
    with pytest.raises(ValueError, match=f"is a file; give the folder that holds it, {bert}"):
        sparse_hf.convert(bert / "model.safetensors", tmp_path / "out", PATTERN, progress=False)
    (bert / "model.safetensors").unlink()
    for content, message in ((b"PK12", "is damaged"), (b"\x80\x02}", "is damaged"), (b"", "is empty")):
        (bert / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    torch.save([1, 2], bert / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no state dict"):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_large_torch_file_is_split(form, tmp_path, monkeypatch):
    dense = dense_model("LlamaForCausalLM")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").unlink()
    state = dense.state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    # a tensor whose numbers do not lie in their order, and one that is a part of another
    state[name] = state[name].T.contiguous().T
    state["model.norm.weight"] = torch.cat([torch.ones(5), state["model.norm.weight"]])[5:]
    torch.save(state, tmp_path / "dense" / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    monkeypatch.setattr(weights_module, "LARGEST_FILE", 20_000)
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, progress=False)
    after = weights(tmp_path / "sparse")
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
    files = sorted(file.name for file in (tmp_path / "sparse").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state) and set(index["weight_map"].values()) == set(files)
    told = sparse_hf.SparseLlamaForCausalLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)[1]
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_the_report_says_what_was_done_and_what_would_be_done(tmp_path):
    dense_model("BartForConditionalGeneration").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    options = {"layers": "encoder 1=dense, decoder=window(63, 0)", "max_length": 2048}
    before = sorted(path.name for path in tmp_path.rglob("*"))
    told = describe_conversion(tmp_path / "dense", PATTERN, **options)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, progress=False, **options)
    assert json.loads((tmp_path / "sparse" / "conversion.json").read_text()) == told
    text = (tmp_path / "sparse" / "conversion.txt").read_text()
    assert report_text(told) == text
    patterns = ("window(16, 16) | first(1)", "window(None, None)", "window(63, 0) & causal()")
    wanted = [sparse_hf.build_plan(pattern, 2048, 2048).density for pattern in patterns]
    assert [entry["density"] for entry in told["layers"]] == wanted
    assert [(entry["stack"], entry["first"], entry["last"]) for entry in told["layers"]] == [
        ("encoder", 0, 0),
        ("encoder", 1, 1),
        ("decoder", 0, 1),
    ]
    for line in (
        "dense: bart -> SparseBartForConditionalGeneration",
        f"encoder layer 0: window(16, 16) | first(1) ({wanted[0]:.2%} of 2,048 tokens)",
        "encoder layer 1: window(None, None) (100.00% of 2,048 tokens)",
        "decoder layers 0-1: window(63, 0) & window(None, 0)",
        "Length: 512 -> 2,048 tokens (learned positions, tile)",
        "grown: model.encoder.embed_positions.weight [514, 32] -> [2050, 32]",
        "Not touched: 90 tensors, 184,324 bytes",
        "Tokenizer's limit: 512 -> 2,048",
        "sparse_hf",
    ):
        assert line in text


def test_models_with_a_past_are_reported_cut_to_it(tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path / "llama")
    told = describe_conversion(tmp_path / "llama", "window(16, 16) | marked()", global_token_ids=[5])
    (entry,) = told["layers"]
    assert entry["pattern"] == "(window(16, 16) | marked()) & window(None, 0)" and entry["density_length"] == 512
    assert "of 512 tokens, without the marked tokens)" in report_text(told)


def test_what_is_there_is_not_overwritten_unless_asked(bert, tmp_path):
    sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    with pytest.raises(FileExistsError, match="is not empty; give another folder, or overwrite=True"):
        sparse_hf.convert(bert, tmp_path / "out", "window(1, 1)", progress=False)
    sparse_hf.convert(bert, tmp_path / "out", "window(1, 1)", progress=False, overwrite=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.sparse_attention["patterns"] == {"sparse": "window(1, 1)"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert", "out"]


def test_a_full_disk_is_told_before_and_on_the_way(bert, tmp_path, monkeypatch):
    class Little:
        free = 10

    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: Little)
    with pytest.raises(OSError, match="has 10 bytes free; the checkpoint needs"):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    monkeypatch.undo()

    def fails(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module, "_copy", fails)
    with pytest.raises(OSError, match="is full; about .* bytes are needed. Nothing was left behind"):
        sparse_hf.convert(bert, tmp_path / "out", PATTERN, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


KILLED = """
import sys, time
from sparse_hf.conversion import weights as w
real = w.write_file
def slow(*a, **k):
    real(*a, **k)
    print("written", flush=True)
    time.sleep(60)
w.write_file = slow
import sparse_hf
sparse_hf.convert(sys.argv[1], sys.argv[2], "window(3, 3)", progress=False)
"""


def test_a_killed_conversion_leaves_nothing_that_loads_and_the_next_one_succeeds(tmp_path, caplog):
    dense_model("BertForMaskedLM").save_pretrained(tmp_path / "bert", max_shard_size="20KB")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "bert"), str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout.readline() == "written\n"
    # another one at the same time is refused
    with pytest.raises(FileExistsError, match=f"process {child.pid} is writing"):
        sparse_hf.convert(tmp_path / "bert", tmp_path / "out", PATTERN, progress=False)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    partial = next(p for p in tmp_path.iterdir() if "partial" in p.name)
    assert not (tmp_path / "out").exists() and not (partial / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(partial)
    sparse_hf.convert(tmp_path / "bert", tmp_path / "out", PATTERN, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert", "out"]
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")).__name__ == "SparseBertForMaskedLM"


def test_time_moves_on():
    # `_alive` must tell a finished process from a running one
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    time.sleep(0.01)
    assert folder_module._alive(os.getpid()) and not folder_module._alive(child.pid)


def write_gguf(file: Path) -> None:
    """A tiny Llama with eight-bit weights and the tokenizer of a few words."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(40)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(37))])
    writer.add_token_scores([0.0] * 40)
    writer.add_token_types([2, 3, 3, *[1] * 37])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (40, 64), "output": (40, 64)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{n}": (64, 64) for n in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{n}": (32, 64) for n in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{n}": (64, 64) for n in ("gate", "up", "down")}
    for name, shape in shapes.items():
        rows = generator.normal(0, 0.05, shape).astype(np.float32)
        packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", *(f"blk.{i}.{n}_norm" for i in range(2) for n in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


def test_a_gguf_file_is_dequantised(tmp_path):
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "tiny.gguf"
    write_gguf(file)
    for out in (tmp_path, tmp_path / "models", file):
        with pytest.raises(ValueError, match="give a folder elsewhere"):
            sparse_hf.convert(file, out, PATTERN, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="'0-5' is outside the model"):
        sparse_hf.convert(file, tmp_path / "sparse", PATTERN, layers="0-5=dense", progress=False)
    told = describe_conversion(file, PATTERN, max_length=512, rope="linear")
    assert told["source"] == "tiny.gguf" and told["architectures"] == ["SparseLlamaForCausalLM"]
    assert [p.name for p in tmp_path.iterdir()] == ["models"]
    sparse_hf.convert(file, tmp_path / "sparse", PATTERN, max_length=512, rope="linear", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "models", gguf_file="tiny.gguf")
    assert all(torch.equal(t, dense.state_dict()[name].float()) for name, t in model.state_dict().items())
    assert model.config.rope_parameters["factor"] == 4.0 and model(torch.ones(1, 300).long()).logits.isfinite().all()
    written = {p.name for p in (tmp_path / "sparse").iterdir()}
    assert {"conversion.json", "conversion.txt", "tokenizer.json", "model.safetensors"} <= written
    assert "tiny.gguf: llama" in (tmp_path / "sparse" / "conversion.txt").read_text()
