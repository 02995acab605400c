"""Processes that share each text have the loss and the gradients of one that has all of it.

That one is of Transformers, with a dense mask, in float64.
"""

from __future__ import annotations

import re
from importlib import import_module

import pytest
import torch

import sparse_hf
from sparse_hf.train import split_sequence
from tests.processes import TORCHRUN, finished
from tests.train import split_ranks

# heads of Transformers compute softmax, norms and losses in single precision, whatever the weights
# are in
LIMIT = 2e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return split_ranks.steps(tmp_path_factory.mktemp("split"))


@pytest.mark.parametrize("cell", split_ranks.CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_parts_have_the_gradients_of_the_whole(cell, found):
    check(cell, found)


def check(cell, found) -> None:
    """Compare what all ranks have with one process."""
    wanted = split_ranks.expected(cell)
    largest = max(grad.norm() for grad in wanted.values())
    for rank in found:
        has = rank[tuple(cell)]
        assert has.keys() == wanted.keys()
        assert float(has["loss"]) == pytest.approx(float(wanted["loss"]), rel=LIMIT)
        for name, grad in wanted.items():
            off = (has[name] - grad).norm()
            # gradients of keys' biases are zero but for roundings
            assert off <= LIMIT * (grad.norm() + largest / 100), (name, float(off), float(grad.norm()))


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus_have_the_gradients_of_one_process(ranks, tmp_path):
    """The same steps, a GPU for each process, over NCCL."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    status, said = finished(*TORCHRUN, "--nproc-per-node", str(ranks), "-m", "tests.train.split_ranks", str(tmp_path))
    assert status == 0, said[-6000:]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    cells = [cell for cell in split_ranks.CELLS if cell.ranks == ranks]
    assert cells
    for cell in cells:
        check(cell, found)


def test_what_is_exchanged_does_not_grow_with_the_text(found):
    for rank in found:
        for short, long in rank["bytes"].values():
            assert short == long > 0


def test_what_a_layer_exchanges_is_the_window_and_the_first_tokens(found):
    """Keys and values of two layers, forwards and backwards, in float32, and what every step costs."""
    sent = [rank["bytes"]["llama", "window(15, 0) | first(2)"][0] for rank in found]
    # tests' Llama has 2 key heads of 8
    token = 2 * 2 * 8 * 4
    # one layer: forwards the first sends its last 15 and its first 2 tokens; the others send 15, but the last
    forwards = [15 + 2 * 3, 15, 15, 0]
    # gradients go the other way
    backwards = [0, 17, 17, 17]
    per_step = {sent[rank] - 2 * token * (forwards[rank] + backwards[rank]) for rank in range(4)}
    assert len(per_step) == 1 and per_step.pop() < 200


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "lsh": "chooses pairs from queries and keys",
        "4-D": "attention_mask is no \\[batch, tokens\\] mask",
        "rows": "trained with a label for each token",
        "bias": "has a bias by distance",
        "two texts": "has two texts",
        "other texts": "were given different ones",
        "short": "each needs one token at least",
    }.items(),
)
def test_refusals_name_the_remedy(name, message, found):
    for rank in found:
        assert re.search(message, rank["refusals"].get(name, "nothing")), rank["refusals"].get(name)


def test_trainer_does_what_it_does_alone(found, tmp_path):
    """Two pairs of processes, by accelerate's own setting; a run that goes on from a checkpoint too."""
    alone = split_ranks.trained(str(tmp_path), shared=False)
    for rank in found:
        has = rank["trained"]
        assert has["bytes"] > 0 == alone["bytes"]
        for run in has.keys() & {"first", "again"}:
            flat = [sum(has[run]["history"], ()), sum(alone[run]["history"], ())]
            assert flat[0] == pytest.approx(flat[1], rel=1e-4)
            assert has[run]["eval_loss"] == pytest.approx(alone[run]["eval_loss"], rel=1e-4)
            torch.testing.assert_close(has[run]["weights"], alone[run]["weights"], rtol=1e-3, atol=1e-4)


def test_a_process_that_ends_is_told_of(tmp_path):
    said = split_ranks.left_alone(tmp_path)
    assert "one of them has ended or hangs" in said and "ddp_timeout" in said


def test_without_processes():
    model = sparse_hf.sparsify(split_ranks.stock("llama"), "window(4, 0)")
    with pytest.raises(ValueError, match="there is no process group"):
        split_sequence(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_caches_of_any_name_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"{name} was given, and decoding takes a whole model"):
        import_module("sparse_hf.train.split_sequence")._check_arguments(None, {name: object()})
