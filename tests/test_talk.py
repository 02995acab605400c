"""`sparse-hf generate` and `sparse-hf chat`: the same tokens as one call of `generate`, of any number of turns."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import sparse_hf
from sparse_hf.cli import app, decoder
from sparse_hf.cli.turns import Turns
from tests.models.families import EOS, VOCABULARY, dense_model

PATTERN = "window(20, 0) | first(4)"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} w5 {{ m.content }} w6{% else %} w7 {{ m.content }} </s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} w7{% endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Words w4, w5 ... for the ids of tiny models; 1 begins a text and 2 ends it."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = template
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, template in (("plain", None), ("chat", TEMPLATE)):
        made[name] = tmp_path_factory.mktemp(name)
        sparse_hf.sparsify(dense_model("LlamaForCausalLM"), PATTERN).save_pretrained(made[name])
        tokenizer(template).save_pretrained(made[name])
    return made


def invoke(*arguments, given: str = "", code: int = 0):
    done = CliRunner().invoke(app, list(map(str, arguments)), input=given, catch_exceptions=code == 2)
    assert done.exit_code == (1 if code else 0), done.output
    return done


def expected(ids: list[int], new: int) -> list[int]:
    """Greedy tokens of the pattern, behind a cache that keeps all keys."""
    model = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), PATTERN)
    found = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    return found[0, len(ids) :].tolist()


def words(ids: list[int]) -> str:
    return "".join(f"w{i}" for i in ids if i > 3)


LONG = [5 + i * 7 % 80 for i in range(90)]
GREEDY = ("--temperature", "0", "--device", "cpu")


def test_generate_continues_a_prompt(folders, tmp_path, monkeypatch):
    # read in pieces
    monkeypatch.setattr(decoder, "PIECE", 32)
    text = " ".join(f"w{i}" for i in LONG)
    (tmp_path / "p.txt").write_text(text)
    right = words(expected(LONG, 12))
    for how in (("--prompt", text), ("--prompt-file", tmp_path / "p.txt"), ()):
        done = invoke("generate", folders["plain"], *how, *GREEDY, "--max-new-tokens", 12, given="" if how else text)
        assert done.stdout == right + "\n", how
        assert re.search(r"12 tokens, cut at --max-new-tokens, [\d.,]+ tokens/s; \d+ kept of 102 seen", done.stderr)


@pytest.mark.parametrize("cache", ["streaming", "dynamic"])
def test_generate_says_what_it_took(folders, cache):
    text = " ".join(f"w{i}" for i in LONG)
    done = invoke(
        "generate", folders["plain"], "--prompt", text, "--json", "--cache", cache, "--max-new-tokens", 12, *GREEDY
    )
    found = json.loads(done.stdout)
    assert found["text"] == words(expected(LONG, 12)) and found["prompt_tokens"] == 90 and found["new_tokens"] == 12
    assert found["seen"] == 102 and found["ended"] == "length" and found["seconds"] > 0
    # of a window of 21 and 4 sinks, and what the cache has to spare
    assert found["kept"] < 60 if cache == "streaming" else found["kept"] >= 101


def test_generate_makes_a_dense_folder_sparse(tmp_path):
    dense_model("LlamaForCausalLM").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    text = " ".join(f"w{i}" for i in LONG)
    done = invoke("generate", tmp_path, "--prompt", text, "--pattern", PATTERN, "--max-new-tokens", 5, *GREEDY)
    assert done.stdout == words(expected(LONG, 5)) + "\n"
    dense = invoke("generate", tmp_path, "--prompt", text, "--max-new-tokens", 5, "--json", *GREEDY)
    assert json.loads(dense.stdout)["kept"] >= 94


def test_turns_are_those_of_the_template_behind_each_other(folders):
    done = invoke(
        "chat", folders["chat"], *GREEDY, "--max-new-tokens", 6, given="w10 w11\nw12\n/reset\nw12\n/quit\nw13\n"
    )
    first = [1, 5, 10, 11, 6, 7]
    answers = [expected(first, 6)]
    # the template ends an answer that the model did not end, and that stands as it came
    said = answers[0][:-1] if answers[0][-1] == EOS else answers[0]
    second = [*first, *said, EOS, 5, 12, 6, 7]
    answers.append(expected(second, 6))
    answers.append(expected([1, 5, 12, 6, 7], 6))
    assert done.stdout.split() == [words(answer) for answer in answers]
    assert "forgotten" in done.stderr and f"of {len(second) + 6} seen" in done.stderr


def test_plain_turns_continue_the_text(folders):
    done = invoke("chat", folders["plain"], *GREEDY, "--max-new-tokens", 4, given="w10 w11\n\n/x\nw12 w13\n")
    first = expected([10, 11], 4)
    said = first[:-1] if first[-1] == EOS else first
    assert done.stdout.split() == [words(first), words(expected([10, 11, *said, 12, 13], 4))]
    assert "no chat template: the model continues your text as it is" in done.stderr
    assert "/x is no command; there are /reset and /quit" in done.stderr


def test_memory_of_a_long_conversation_is_bounded(folders):
    turns = "".join(f"w{10 + i} w{20 + i} w{30 + i}\n" for i in range(20))
    done = invoke("chat", folders["chat"], *GREEDY, "--max-new-tokens", 8, given=turns)
    found = [(int(kept), int(seen)) for kept, seen in re.findall(r"(\d+) kept of (\d+) seen", done.stderr)]
    assert len(found) == 20 and found[-1][1] > 150 and max(kept for kept, _ in found) < 60
    assert len({kept for kept, _ in found[-10:]}) == 1


def test_a_system_text_stands_first():
    template = TEMPLATE.replace("{% else %}", "{% elif m.role == 'system' %} w8 {{ m.content }}{% else %}")
    turns = Turns(tokenizer(template), "w9")
    assert turns.ids("w10", is_first=True) == [1, 8, 9, 5, 10, 6, 7]
    assert turns.ids("w10", is_first=False) == [EOS, 5, 10, 6, 7]
    with pytest.raises(ValueError, match="--system needs a tokenizer with a chat template"):
        Turns(tokenizer(), "w9")


def test_an_interrupt_stops_an_answer_and_keeps_the_conversation(folders, monkeypatch):
    loaded = decoder.load_decoder(str(folders["plain"]), None, "auto", None, "cpu")
    text, written = decoder.Text(loaded, {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}), []

    def write(piece: str) -> None:
        written.append(piece)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    found = text.answer(LONG, write)
    assert found.ended == "interrupted" and 1 <= found.tokens < 50 and text.seen == 90 + found.tokens
    again = text.answer([10, 11], written.append)
    so_far = [*LONG, *expected(LONG, found.tokens), 10, 11]
    model = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), PATTERN)
    whole = model.generate(torch.tensor([so_far]), max_new_tokens=again.tokens, do_sample=False, eos_token_id=None)
    assert torch.equal(text.ids, whole[:, : text.seen])
    # while a prompt is read
    monkeypatch.setattr(decoder, "PIECE", 16)
    before = text.seen
    part = text.answer(LONG, written.append, lambda read: signal.raise_signal(signal.SIGINT))
    assert part.read < 90 and part.tokens == 0 and text.seen == before + part.read == int(text.cache.get_seq_length())


def test_a_second_interrupt_ends_all(folders):
    loaded = decoder.load_decoder(str(folders["plain"]), None, "auto", None, "cpu")

    def write(piece: str) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        decoder.Text(loaded, {"max_new_tokens": 50, "do_sample": False}).answer(LONG, write)
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_in_a_terminal(folders):
    """Through a pseudo-terminal: a prompt, an answer, Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sparse_hf",
        "chat",
        str(folders["chat"]),
        *GREEDY,
        "--max-new-tokens",
        "6",
    ]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=Path(__file__).parents[1], start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    shown = ""

    def wait_for(text: str) -> None:
        """Read up to a text behind what was waited for before."""
        nonlocal shown
        begin = len(shown)
        while text not in shown[begin:]:
            ready, _, _ = select.select([ours], [], [], 120)
            assert ready, shown
            shown += os.read(ours, 1).decode("latin-1")

    try:
        wait_for("> ")
        os.write(ours, b"w10 w11\n")
        wait_for("seen")
        wait_for("> ")
        os.write(ours, b"/quit\n")
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert words(expected([1, 5, 10, 11, 6, 7], 6)) in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "x"], "cache is 'x'; the known ones are auto, streaming, dynamic"),
        (["--dtype", "fp8"], "dtype is 'fp8'"),
        (["--device", "cuda:99"], "device is 'cuda:99'"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--pattern", "first(1)"], "is sparse already, and has a pattern of its own; leave --pattern out"),
        (["--prompt-file", "x"], "there are --prompt and --prompt-file; give one of them"),
    ],
)
def test_bad_input_is_refused(folders, arguments, message):
    done = invoke("generate", folders["plain"], "--prompt", "w5", *arguments, code=2)
    assert message in str(done.exception)


def test_what_is_no_decoder_is_refused(tmp_path):
    dense_model("BertForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds BertForMaskedLM, which does not continue texts; decoders do"):
        decoder.load_decoder(str(tmp_path), None, "auto", None, "cpu")
