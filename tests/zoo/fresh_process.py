"""Saved folders in a process that has never met their family: it has imported sparse_hf, and forks for each of them.

An interpreter of its own for each folder would spend most of its time on importing torch and Transformers.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoBackbone, AutoConfig

from sparse_hf.models.derived.check import tensors_of
from sparse_hf.models.hf.auto_classes import auto_classes
from sparse_hf.models.hf.register import FAMILIES

ROOT = Path(__file__).parents[2]
INPUTS, ANSWERS, FAILURE = "inputs.pt", "answers.pt", "failure.txt"


def loaded_answers(folder: Path, inputs: dict[str, Any]) -> list[Tensor]:
    """What a saved model answers where its family is first met in its folder, loaded by an Auto class if any knows it.

    Raises:
        OSError: it does not load, or does not answer; the message says why.
    """
    torch.save(inputs, folder / INPUTS)
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{folder}\n")
    server.stdin.flush()
    if not server.stdout.readline():
        raise OSError("the process that loads folders has ended")
    if (folder / FAILURE).exists():
        raise OSError((folder / FAILURE).read_text(encoding="utf-8"))
    return torch.load(folder / ANSWERS, weights_only=True)


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.zoo.fresh_process"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # it ends by itself where this process ends in another way, as nothing more can come
    atexit.register(server.kill)
    return server


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(Path(line.rstrip("\n")))
        os.waitpid(child, 0)
        print(flush=True)


def _answer(folder: Path) -> None:
    """Load, answer and end this process, whose parent's output stays its parent's."""
    sys.stdout = sys.stderr
    try:
        torch.save(_load_and_run(folder), folder / ANSWERS)
    except Exception as error:  # noqa: BLE001 - whatever a class of others does, the other process says it
        (folder / FAILURE).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    finally:
        os._exit(0)


def _load_and_run(folder: Path) -> list[Tensor]:
    before = set(FAMILIES.derived())
    config = AutoConfig.from_pretrained(folder)
    assert not {type(config).__bases__[1].model_type} & before
    name: str = config.architectures[0]
    # that of backbones loads what is on the hub, and no folder
    autos = (auto for auto in auto_classes() if auto is not AutoBackbone and name in _known(auto, type(config)))
    loads: Any = next(autos, None) or getattr(sys.modules[type(config).__module__], name)
    model = loads.from_pretrained(folder).eval()
    assert type(model).__name__ == name, f"{loads.__name__} makes a {type(model).__name__} of it"
    with torch.no_grad():
        return tensors_of(model(**torch.load(folder / INPUTS, weights_only=True)))


def _known(auto: Any, config_class: type) -> list[str]:
    found = auto._model_mapping.get(config_class, ())
    return [c.__name__ for c in (found if isinstance(found, (list, tuple)) else (found,))]


if __name__ == "__main__":
    from tests.zoo.trial import be_quiet

    be_quiet()
    _serve()
