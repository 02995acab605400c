"""Several processes on the CPU have the loss and the gradients of one.

That one is of Transformers, with the whole batch.
"""

from __future__ import annotations

import math

import pytest
import torch

import sparse_hf
from tests.train import ranks

# heads of Transformers compute softmax, norms and losses in single precision, whatever the weights
# are in
LIMIT = 2e-6


@pytest.fixture(
    scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["two processes", "four processes"]
)
def found(request, tmp_path_factory):
    return ranks.steps(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("family", "way", "data"), ranks.CELLS)
def test_processes_have_the_gradients_of_one(family, way, data, found):
    wanted = ranks.expected(family, data)
    largest = max(grad.norm() for grad in wanted.values())
    for rank in found:
        has = rank[family, way, data]
        sharded = has.pop("sharded")
        # what should be spread is spread: nothing fell back to whole copies
        assert (sharded == 0) == (way == "ddp")
        assert has.keys() == wanted.keys()
        assert float(has["loss"]) == pytest.approx(float(wanted["loss"]), rel=LIMIT)
        for name, grad in wanted.items():
            off = (has[name] - grad).norm()
            # gradients of keys' biases are zero but for roundings
            assert off <= LIMIT * (grad.norm() + largest / 100), (name, float(off), float(grad.norm()))


def test_evaluation_counts_every_row_once(found, tmp_path):
    """The last batches are filled up with rows that were seen before."""
    alone = ranks.perplexity(str(tmp_path))
    model, batch = ranks.stock("llama"), {k: v[:5] for k, v in ranks.whole_batch("llama", "packed").items()}
    sparse = sparse_hf.sparsify(model, ranks.SPARSE["llama"]).eval()
    assert alone["eval_perplexity"] == pytest.approx(math.exp(sparse(**batch).loss.detach()), rel=1e-5)
    for rank in found:
        assert rank["perplexity"] == pytest.approx(alone, rel=1e-5)


def test_every_process_has_the_teacher_that_one_loads(found):
    """FSDP's efficient loading leaves the others zeros, before Transformers 5.24."""
    dense = ranks.stock("llama").float().eval()
    wanted = {
        **dense.state_dict(),
        "answers": dense(input_ids=ranks.whole_batch("llama", "padded")["input_ids"]).logits,
    }
    for rank in found:
        has = rank["teacher"]
        assert wanted.keys() == has.keys()
        for name, right in wanted.items():
            torch.testing.assert_close(has[name], right.detach(), rtol=1e-5, atol=1e-5)
