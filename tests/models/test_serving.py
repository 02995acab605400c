"""`transformers serve` of a sparse folder: over HTTP come the tokens that `generate` gives in the process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import sparse_hf
from tests.models.families import dense_model
from tests.models.test_continuous_batching import IS_TAKEN
from tests.models.test_libraries import text, words
from tests.processes import HANG_S, ROOT

NEEDED = ("fastapi", "openai", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(NEEDED)}")
HEAD, PATTERN = "LlamaForCausalLM", "window(7, 0) | first(2)"
NEW, POLL_S = 12, 0.1
QUESTIONS = [text(length, seed=length) for length in (60, 25, 41, 9)]
BATCHING = ("--continuous-batching", "--cb-block-size", "8", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "64")
MODES = {
    "one_by_one": (),
    "batched": pytest.param(BATCHING, marks=pytest.mark.skipif(not IS_TAKEN, reason="pages are Transformers' own")),
}


@dataclass(frozen=True)
class Server:
    """A server of one folder, at a port of this machine."""

    port: int
    folder: str

    def answer(self, path: str, **asked) -> str:
        """What the server says to a request, which must succeed."""
        body = json.dumps({"model": self.folder, "temperature": 0, "max_tokens": NEW, **asked})
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)) as connection:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read().decode()
        assert response.status == 200, said
        return said

    def chat(self, question: str, **asked) -> str:
        return self.answer("/v1/chat/completions", messages=[{"role": "user", "content": question}], **asked)


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """A server of the folder in a process of its own, which ends with the block."""
    start = "from transformers.cli.transformers import main; main()"
    given = ["serve", str(folder), "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", "0"]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent), "PYTHONUNBUFFERED": "1"}
    with (
        log.open("w") as said,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", start, *given, *options], cwd=ROOT, env={**os.environ, **own},
            stdout=said, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        try:
            yield Server(_port(process, log), str(folder))
        finally:
            # it has nothing to save
            process.kill()


def _port(process: subprocess.Popen, log: Path) -> int:
    """The port that the system gave the server, once it listens."""
    end = time.monotonic() + HANG_S
    while time.monotonic() < end:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            return int(found[1])
        assert process.poll() is None, log.read_text()
        time.sleep(POLL_S)
    raise AssertionError(f"the server did not start in {HANG_S} s and said:\n{log.read_text()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("served") / "sparse"
    sparse_hf.sparsify(dense_model(HEAD), PATTERN).save_pretrained(path)
    words().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES.keys())
def server(request, folder, tmp_path_factory) -> Iterator[Server]:
    with serving(folder, tmp_path_factory.mktemp("log") / "server.txt", *request.param) as found:
        yield found


def here(model, folder: Path, question: str) -> str:
    """What `generate` makes of a text, which is what the chat template makes of one question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": question}]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False).strip() == question
    prompt = tokenizer(question, return_tensors="pt")
    given = model.generate(prompt["input_ids"], do_sample=False, max_new_tokens=NEW)
    return tokenizer.decode(given[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def wanted(folder) -> dict[str, str]:
    model = sparse_hf.SparseLlamaForCausalLM.from_pretrained(folder)
    found = {question: here(model, folder, question) for question in QUESTIONS}
    # who served the weights without the pattern would be seen
    assert here(dense_model(HEAD), folder, QUESTIONS[0]) != found[QUESTIONS[0]]
    return found


def test_chats_at_once(server, wanted):
    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        answers = [json.loads(said) for said in threads.map(server.chat, QUESTIONS)]
    found = [answer["choices"][0]["message"]["content"].strip() for answer in answers]
    assert found == [wanted[question] for question in QUESTIONS]


def test_a_chat_token_by_token(server, wanted):
    said = server.chat(QUESTIONS[0], stream=True)
    events = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]]
    assert len(deltas) > 1 and "".join(deltas).strip() == wanted[QUESTIONS[0]]


def test_a_text_is_gone_on_with(server, wanted):
    said = json.loads(server.answer("/v1/completions", prompt=QUESTIONS[0]))
    assert said["choices"][0]["text"].strip() == wanted[QUESTIONS[0]]
