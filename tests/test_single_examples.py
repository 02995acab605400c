"""Examples that stand alone in one file: what they say is what the models say, called by hand."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sparse_hf
from examples import chat, embed, export, infer, retrieve, tiny
from tests.processes import printed

WINDOW = "window(31, 0) | first(4)"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("models")
    tiny.write(found)
    for name, text in (("law", tiny.LAW), ("sea", tiny.SEA)):
        (found / f"{name}.txt").write_text(f"{text} " * 30)
    return found


def test_they_import_no_other_example():
    for module in (chat, embed, export, infer, retrieve):
        assert "examples import" not in Path(module.__file__).read_text(encoding="utf-8")


def test_a_text_is_continued(folder):
    given = ["--model", str(folder / "my-llama"), "--text", str(folder / "law.txt"), "--pattern", WINDOW]
    said = infer.main([*given, "--max-new-tokens", "5"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-llama")
    model = sparse_hf.sparsify(AutoModelForCausalLM.from_pretrained(folder / "my-llama"), WINDOW).eval()
    ids = tokenizer((folder / "law.txt").read_text(), return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert said == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_turns_are_answered(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("who owns the land\nwho pays the rent\n"))
    turns = chat.main(["--model", str(folder / "my-llama"), "--window", "32", "--max-new-tokens", "4"])
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    # a cache that keeps everything answers the same
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-llama")
    model = sparse_hf.sparsify(AutoModelForCausalLM.from_pretrained(folder / "my-llama"), WINDOW).eval()
    prompt = tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert turns[3]["content"] == tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "bytes of cache" in capsys.readouterr().err


def test_documents_are_embedded_and_found(folder):
    files = [str(folder / "law.txt"), str(folder / "sea.txt")]
    given = ["--model", str(folder / "my-bert"), "--length", "1024", "--pattern", "window(16, 16) | first(1)"]
    vectors = embed.main([*given, "--folder", str(folder / "long"), "--out", str(folder / "vectors.pt"), *files])
    assert torch.equal(torch.load(folder / "vectors.pt", weights_only=True), vectors)
    model, tokenizer = AutoModel.from_pretrained(folder / "long").eval(), AutoTokenizer.from_pretrained(folder / "long")
    for vector, path in zip(vectors, files, strict=True):
        ids = tokenizer(Path(path).read_text(), return_tensors="pt", truncation=True, max_length=1024)
        mean = model(**ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    # a document is nearest to itself, sparse folder or dense
    for name in ("long", "my-bert"):
        found = retrieve.main(["--model", str(folder / name), "--question", f"{tiny.SEA} " * 30, *files])
        assert [one for one, _ in found] == ["sea.txt", "law.txt"] and found[0][1] == pytest.approx(1, abs=1e-5)


def test_what_is_exported_is_read_back(folder):
    graph = folder / "bert.pt2"
    given = ["--pattern", "window(16, 16) | first(1)", "--out", str(graph)]
    assert export.main(["graph", "--model", str(folder / "my-bert"), *given]) < 1e-5
    # the operator is all that it needs, no class of a model
    script = "import sys, torch, sparse_hf.attention\nids = torch.ones(1, 77, dtype=torch.long)\n"
    script += f"print(*torch.export.load({str(graph)!r}).module()(input_ids=ids).shape, 'transformers' in sys.modules)"
    assert printed(script).splitlines()[-1].split() == ["1", "77", "32", "False"]
    given = ["--pattern", "window(31, 0)", "--out", str(folder / "mistral")]
    assert export.main(["native", "--model", str(folder / "my-llama"), *given]) < 1e-4
