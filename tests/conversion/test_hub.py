"""Hub ids, against a stand-in for the hub: what is fetched, what is refused, what is sent."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

import sparse_hf
from sparse_hf import push_to_hub
from sparse_hf.cli import main
from sparse_hf.conversion.card import write_card
from tests.fresh import fresh
from tests.hub_server import OWNER, TOKEN, StandIn, stand_in
from tests.models.families import dense_model

PATTERN = "window(16, 16) | first(1)"
# what repositories hold beside a checkpoint
OTHERS = [
    "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "onnx/model.onnx", "onnx/config.json",
    "openvino/openvino_model.xml", "openvino/openvino_model.bin", "coreml/text/weights/weight.bin", "consolidated.safetensors",
    "original/consolidated.00.pth", "model.fp16.safetensors", "model-q4.gguf",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[StandIn]:
    with stand_in() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def bert(tmp_path) -> Path:
    """A checkpoint as hubs have them: in every form, with a card and what comes after the model."""
    folder = tmp_path / "bert"
    dense_model("BertForMaskedLM", max_position_embeddings=160).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/bigger\n---\n# dense\n")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    for name, content in {
        "1_Pooling/config.json": "{}",
        "2_Dense/config.json": "{ }",
        "extra/note.txt": "note",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    save_file({"linear.weight": torch.zeros(2, 2)}, folder / "2_Dense" / "model.safetensors")
    for name in (*OTHERS, "2_Dense/pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"not for us")
    return folder


def convert(source: str, out: Path, **more) -> dict:
    sparse_hf.convert(source, out, PATTERN, progress=False, **more)
    return json.loads((out / "conversion.json").read_text())


@pytest.mark.parametrize("repo", ["bert-base-uncased", "owner/bert"])
def test_an_id_is_fetched_and_only_what_is_read(hub, bert, tmp_path, repo):
    hub.add(repo, bert)
    report = convert(repo, tmp_path / "out")
    wanted = {
        "README.md", "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors", "extra/note.txt",
    }  # fmt: skip
    assert sorted(hub.sent) == sorted({*wanted, "generation_config.json"} & {*hub.repositories[repo]["main"]})
    assert report["source"] == repo and report["origin"] == {"license": "mit", "base_model": repo}
    before, after = (load_file(folder / "model.safetensors") for folder in (bert, tmp_path / "out"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    card = ModelCard.load(write_card(tmp_path / "out")).data
    assert (card.base_model, card.license) == (repo, "mit")
    # what is there is not sent again, and nothing is asked of a hub that is gone
    hub.sent.clear()
    convert(repo, tmp_path / "again")
    assert hub.sent == []


@pytest.mark.parametrize("form", ["bin", "bin_shards", "shards"])
def test_other_forms_of_weights(hub, bert, tmp_path, form):
    weights = load_file(bert / "model.safetensors")
    names = sorted(weights)
    parts, ending = [names[::2], names[1::2]], "safetensors" if form == "shards" else "bin"
    stem = "model" if form == "shards" else "pytorch_model"
    wanted = (
        {f"{stem}-{n}-of-2.{ending}": part for n, part in enumerate(parts)}
        if form != "bin"
        else {"pytorch_model.bin": names}
    )
    for file, part in wanted.items():
        tensors = {name: weights[name] for name in part}
        save_file(tensors, bert / file) if ending == "safetensors" else torch.save(tensors, bert / file)
    if form != "bin":
        index = {"weight_map": {name: file for file, part in wanted.items() for name in part}}
        (bert / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (bert / "model.safetensors").unlink()
    hub.add("owner/bert", bert)
    convert("owner/bert", tmp_path / "out")
    after = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert {name for name in hub.sent if name.endswith((".bin", ".safetensors"))} == {
        *wanted,
        "2_Dense/model.safetensors",
    }


def test_a_revision_a_folder_and_a_token(hub, bert, tmp_path):
    hub.add("owner/bert", bert)
    shutil.copytree(bert, tmp_path / "other" / "inner")
    changed = {name: t + 1 for name, t in load_file(bert / "model.safetensors").items()}
    save_file(changed, tmp_path / "other" / "inner" / "model.safetensors")
    hub.add("owner/bert", tmp_path / "other", revision="v2")
    hub.locked.add("owner/bert")
    with pytest.raises(
        FileNotFoundError, match="owner/bert is no local folder and could not be fetched from the hub: 401"
    ):
        convert("owner/bert", tmp_path / "out")
    given = {"revision": "v2", "subfolder": "inner", "token": TOKEN}
    convert("owner/bert", tmp_path / "out", **given)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], changed[name]) for name in changed)
    assert all(name.startswith("inner/") for name in hub.sent)
    with pytest.raises(FileNotFoundError, match="owner/bert has no folder nowhere"):
        convert("owner/bert", tmp_path / "none", token=TOKEN, subfolder="nowhere")
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub: 404.*Revision Not Found"):
        convert("owner/bert", tmp_path / "none", token=TOKEN, revision="v3")
    report = sparse_hf.conversion.describe_conversion("owner/bert", PATTERN, **given)
    assert report["source"] == "owner/bert"


def test_a_hub_that_is_gone(hub, bert, tmp_path, monkeypatch):
    hub.add("bert-base-uncased", bert)
    convert("bert-base-uncased", tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert("bert-base-uncased", tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="gpt2 is no local folder and could not be fetched from the hub"):
        convert("gpt2", tmp_path / "other")


def test_folders_and_files_are_no_ids(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "all" / "inner")
    assert convert(str(tmp_path / "all"), tmp_path / "out", subfolder="inner")["source"] == "inner"
    with pytest.raises(ValueError, match="revision='main' is for hub ids"):
        convert(str(bert), tmp_path / "other", revision="main")
    with pytest.raises(ValueError, match="revision and subfolder are for folders and hub ids"):
        convert("model.gguf", tmp_path / "other", revision="main")
    for name in ("./bert", "a/b/c", "~/bert", "two words"):
        with pytest.raises(FileNotFoundError, match="no hub id"):
            convert(name, tmp_path / "other")


@pytest.fixture
def sparse(tmp_path) -> Path:
    folder = tmp_path / "llama-sparse"
    sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(7, 0) | first(2)").save_pretrained(folder)
    return folder


def test_a_folder_is_sent_with_its_card_and_figures(hub, sparse, tmp_path):
    figures = {"dataset": "four books", "perplexity": {"sparse": 3.25, "dense": 3.0}, "note": "On a laptop."}
    (sparse / "results.json").write_text(json.dumps(figures))
    address = push_to_hub(sparse, "llama-sparse", private=True, token=TOKEN)
    repo = f"{OWNER}/llama-sparse"
    assert address == f"{hub.address}/{repo}/commit/{hub.commit(repo, 'main')}" and hub.private == {repo: True}
    sent = hub.repositories[repo]["main"]
    assert sent == {path.name: path.read_bytes() for path in sparse.iterdir()}
    card = ModelCard(sent["README.md"].decode())
    assert 'from_pretrained("llama-sparse")' in card.text and "four books" in str(card.data)
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value, result.task_type) == ("perplexity", 3.25, "text-generation")
    assert card.data.to_dict()["model-index"][0]["name"] == "llama-sparse"
    # what was sent is what loads
    model = sparse_hf.SparseLlamaForCausalLM.from_pretrained(repo)
    before = load_file(sparse / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_a_card_that_is_there_is_sent_as_it_is(hub, sparse):
    (sparse / "README.md").write_text("by hand")
    push_to_hub(sparse, f"{OWNER}/other", revision="try", token=TOKEN)
    assert hub.repositories[f"{OWNER}/other"]["try"]["README.md"] == b"by hand"
    assert hub.repositories[f"{OWNER}/other"]["main"] == {}


def test_what_cannot_be_sent_is_told(hub, sparse, bert):
    with pytest.raises(PermissionError, match="could not be sent to me/x: .*401"):
        push_to_hub(sparse, "me/x", token="hf_of_nobody")
    with pytest.raises(ValueError, match="'a/b/c' is no hub id"):
        push_to_hub(sparse, "a/b/c", token=TOKEN)
    with pytest.raises(ValueError, match="is bert, which is dense; convert it first"):
        push_to_hub(bert, "me/x", token=TOKEN)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["convert", "gpt2", "out", "--dry-run", "--push", "me/x"],
            "--dry-run writes nothing that could be sent to me/x",
        ),
        (["card", "{sparse}", "--private"], "--private is about a repository that --push makes"),
        (["export", "{sparse}", "out", "--to", "native", "--revision", "v1"], "revision='v1' is for hub ids"),
    ],
)
def test_flags_that_say_nothing_are_refused(sparse, capsys, arguments, said):
    command = ["sparse-hf", *(word.format(sparse=sparse) for word in arguments)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", command)
        main()
    assert left.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_the_command_fetches_and_sends(hub, bert, tmp_path):
    hub.add("bert-base-uncased", bert, revision="v1")
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    arguments = ["convert", "bert-base-uncased", str(tmp_path / "out"), "--pattern", PATTERN, "--revision", "v1"]
    arguments += ["--token", TOKEN, "--push", "me/bert-sparse"]
    status, said = fresh("from sparse_hf.cli import main; main()", *arguments, environment=own)
    assert status == 0, said
    assert f"sent to {hub.address}/me/bert-sparse/commit/" in said.replace("\n", "")
    card = ModelCard(hub.repositories["me/bert-sparse"]["main"]["README.md"].decode())
    assert card.data.base_model == "bert-base-uncased" and 'from_pretrained("me/bert-sparse")' in card.text
