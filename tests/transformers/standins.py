"""What Transformers' common tests import from folders that the sdist does not carry: ours, as small as will do.

`tests/generation` and `tests/exporters` are among them: their mixins are empty here, and their tests do not run.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing import start_processes
from transformers import pipeline

from tests.processes import HANG_S

# values of a configuration's common fields, each other than its default
CONFIG_COMMON = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["BertModel"],
    "id2label": {0: "zero", 1: "one"},
    "label2id": {"zero": 0, "one": 1},
    "problem_type": "regression",
}


def fork(function: Callable, args: tuple = (), nprocs: int = 1) -> None:
    """Run `function(rank, *args)` in processes of their own.

    They fork from a server that has imported the libraries and derived the families that are tested, and done nothing
    else: a spawned process would do so again, which takes longer than most of the tests, and this process has threads
    that do not survive a fork.
    """
    multiprocessing.set_forkserver_preload(
        [__name__, "transformers.trainer", "sparse_hf.train", "tests.models.families"]
    )
    ranks = start_processes(function, args=args, nprocs=nprocs, start_method="forkserver", join=False)
    deadline = time.monotonic() + HANG_S
    try:
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the ranks hung for {HANG_S} s: one has failed, perhaps, and others wait for it")
    finally:
        for process in ranks.processes:
            process.kill()


def run_distributed(world_size: int) -> Callable:
    """Decorator: the function runs on `world_size` ranks that are joined in a gloo group, its first argument the rank."""

    def decorate(function: Callable) -> Callable:
        def start(*args, **kwargs):
            with tempfile.TemporaryDirectory() as folder:
                fork(_rank, (world_size, f"{folder}/store", function, args, kwargs), world_size)

        return start

    return decorate


def _rank(rank: int, world_size: int, store: str, function: Callable, args: tuple, kwargs: dict) -> None:
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class PipelineCase:
    """A pipeline's run: each example must give something that has `keys`, or numbers if there are none."""

    task: str
    examples: tuple[str, ...] = ("w11 w12 w13 w14 w15 w16 w17 w18", "w20 w21")
    keys: frozenset[str] = frozenset()
    arguments: Mapping[str, Any] = {}

    def get_test_pipeline(self, model, tokenizer=None, dtype="float32", **processors):
        made = pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, **self.arguments)
        return made, list(self.examples)

    def run_pipeline_test(self, made, examples) -> None:
        for example in examples:
            self._check(made(example), example)
        for example, found in zip(examples, made(examples), strict=True):
            self._check(found, example)

    def _check(self, found, example: str) -> None:
        while isinstance(found, list) and found:
            found = found[0]
        if self.keys:
            assert self.keys <= set(found), f"{self.task} on {example!r} gave {found}; it must have {sorted(self.keys)}"
        else:
            assert isinstance(found, float), f"{self.task} on {example!r} gave {type(found).__name__}, not numbers"


# named as in Transformers, whose mixin finds them by name
class FeatureExtractionPipelineTests(PipelineCase):
    task = "feature-extraction"


class FillMaskPipelineTests(PipelineCase):
    task = "fill-mask"
    examples = ("w11 w12 [MASK] w14 w15 w16 w17 w18", "w20 [MASK]")
    keys = frozenset({"score", "token", "token_str", "sequence"})


class TextClassificationPipelineTests(PipelineCase):
    task = "text-classification"
    keys = frozenset({"label", "score"})


class TokenClassificationPipelineTests(PipelineCase):
    task = "token-classification"
    keys = frozenset({"entity", "score", "index"})


class TextGenerationPipelineTests(PipelineCase):
    task = "text-generation"
    keys = frozenset({"generated_text"})
    arguments = {"max_new_tokens": 5, "do_sample": False}


class ZeroShotClassificationPipelineTests(PipelineCase):
    task = "zero-shot-classification"
    keys = frozenset({"labels", "scores"})
    arguments = {"candidate_labels": ["w21", "w22"]}


NAMED = {
    "config_common_kwargs": CONFIG_COMMON,
    "_get_distributed_backend": lambda: "gloo",
    "_get_distributed_device_type": lambda: "cpu",
    "_get_rank_device": lambda rank: torch.device("cpu"),
    "_set_rank_device": lambda rank: None,
    "_start_rank_processes": fork,
}


def stand_in(name: str) -> Any:
    """What `name` is here: an empty class if nothing of it is needed."""
    return NAMED.get(name) or globals().get(name) or type(name, (), {})
