"""What cannot be trained is said, with the value and what to do.

Nothing hangs, and the last checkpoint stays good.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from transformers import AutoModelForCausalLM, DataCollatorWithPadding
from transformers.distributed.configuration_utils import DistributedConfig

import sparse_hf
from examples import tiny
from sparse_hf.models.hf.input_checks import logger
from sparse_hf.models.hf.tensor_parallel import own_heads
from sparse_hf.train import CheckedCollator
from tests.models.families import dense_model
from tests.models.longformers import stock_model
from tests.processes import HANG_S, TORCHRUN, finished
from tests.train import broken_run
from tests.transformers.standins import run_distributed

ROOT = Path(__file__).parents[2]
IDS = torch.randint(4, 97, (2, 20), generator=torch.Generator().manual_seed(0))
# families whose tables hold 512 positions, and one whose angles end nowhere
TABLES = ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel", "OPTForCausalLM", "BartForConditionalGeneration"]


def sparse(head: str):
    stock = stock_model(head) if head.startswith("L") and "Llama" not in head else dense_model(head)
    return sparse_hf.sparsify(stock, "window(5, 5)", layers={"decoder": "window(5, 0)"} if "Bart" in head else None)


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("BertForTokenClassification", IDS * 0 + 2, "labels hold 2; .* 0 to 1, or -100 where"),
        ("BertForSequenceClassification", torch.tensor([0, 7]), "labels hold 7; .* 0 to 1"),
        ("BertForSequenceClassification", torch.tensor([0, -1]), "labels hold -1; .* 0 to 1"),
        ("BertForMaskedLM", IDS.masked_fill(IDS[0, 3] == IDS, 97), "labels hold 97; .* 0 to 96"),
        ("LlamaForCausalLM", IDS.masked_fill(IDS[0, 3] == IDS, -1), "labels hold -1; .* 0 to 96"),
        ("BartForConditionalGeneration", IDS + 100, r"labels hold 1\d\d; .* 0 to 96"),
    ],
)
def test_labels_out_of_range_are_told(head, labels, message):
    model = sparse(head)
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, labels=labels)


def test_labels_that_are_no_classes_pass():
    """Numbers to be met, several classes at a time, and rows that are not asked."""
    head = "BertForSequenceClassification"
    model = sparse_hf.sparsify(dense_model(head, num_labels=1), "window(5, 5)")
    assert model(input_ids=IDS, labels=torch.tensor([3.5, -7.0])).loss.isfinite()
    assert sparse(head)(input_ids=IDS, labels=torch.tensor([[0.0, 1.0], [1.0, 1.0]])).loss.isfinite()
    assert sparse(head)(input_ids=IDS, labels=torch.tensor([-100, 1])).loss.isfinite()


@pytest.mark.parametrize("head", [*TABLES, "LongformerForMaskedLM"])
def test_rows_longer_than_the_table_are_told(head):
    model, most = sparse(head), 256 if "Longformer" in head else 512
    ids = torch.randint(4, 97, (1, most + 1), generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=f"a row has {most + 1} tokens; sparse_.* positions for {most}: truncate, or conv"
    ):
        model(input_ids=ids)
    assert model(input_ids=ids[:, 1:]).logits.isfinite().all()


def test_padding_that_takes_no_position_may_stand_beyond_the_table():
    model = sparse("RobertaForMaskedLM").eval()
    ids = torch.randint(4, 97, (1, 600), generator=torch.Generator().manual_seed(0))
    ids[:, 500:] = 0
    mask = (ids != 0).long()
    padded, cut = model(input_ids=ids, attention_mask=mask), model(input_ids=ids[:, :500])
    torch.testing.assert_close(padded.logits[:, :500], cut.logits)


def test_targets_positions_and_ids_out_of_range_are_told():
    with pytest.raises(ValueError, match="a target has 600 tokens; sparse_bart has positions for 512"):
        sparse("BartForConditionalGeneration")(input_ids=IDS, labels=torch.full((2, 600), 5))
    with pytest.raises(ValueError, match="position_ids hold 519; sparse_bert has a table of 512"):
        sparse("BertForMaskedLM")(input_ids=IDS, position_ids=torch.arange(500, 520)[None])
    with pytest.raises(ValueError, match="input_ids hold 97; the vocabulary is 0 to 96: use the model's own tokenizer"):
        sparse("LlamaForCausalLM")(input_ids=IDS.clamp(min=97))


def test_rotary_models_go_on_as_transformers_has_it_and_are_not_trained_there_unasked(caplog):
    ids = IDS.repeat(1, 30)
    dense = dense_model("LlamaForCausalLM").eval()
    model = sparse_hf.sparsify(dense, "full()").eval()
    warned = "a row has more tokens than sparse_llama is configured for 512 (max_position_embeddings)"
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert model(input_ids=ids[:, :512]).logits.shape[1] == 512 and not caplog.records
        for length in (600, 599):
            torch.testing.assert_close(model(input_ids=ids[:, :length]).logits, dense(input_ids=ids[:, :length]).logits)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [warned]
    collator = CheckedCollator(dict, model)
    with pytest.raises(
        ValueError, match=r"a row has 600 tokens; sparse_llama is configured for 512 \(max_position_emb"
    ):
        collator({"input_ids": ids})
    # packed documents begin anew
    documents = torch.arange(300).repeat(2, 2)
    assert collator({"input_ids": ids, "position_ids": documents}).keys() == {"input_ids", "position_ids"}
    with pytest.raises(ValueError, match="a row has 513 tokens; .* convert the dense checkpoint with max_length=513"):
        collator({"input_ids": ids, "position_ids": documents + 213})
    model.config.max_position_embeddings = 600
    assert collator({"input_ids": ids})["input_ids"] is ids


def test_scaled_angles_reach_as_far_as_they_are_scaled():
    """Qwen2.5 keeps its limit and names the factor; what is converted has both."""
    model = sparse("LlamaForCausalLM")
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
    model.config.rope_parameters = scaling
    collator = CheckedCollator(dict, model)
    assert collator({"input_ids": torch.ones(1, 1024).long()})
    with pytest.raises(ValueError, match="a row has 1025 tokens; sparse_llama is configured for 1024"):
        collator({"input_ids": torch.ones(1, 1025).long()})
    model.config.max_position_embeddings = 2048
    assert collator({"input_ids": torch.ones(1, 2048).long()})


def test_a_collator_tells_before_the_batch_leaves_the_cpu():
    model = sparse("BertForSequenceClassification")
    collator = CheckedCollator(DataCollatorWithPadding(tiny.tokenizer()), model)
    good = [{"input_ids": [2, 9, 3], "labels": 1}, {"input_ids": [2, 3], "labels": 0}]
    assert collator(good)["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="labels hold 2"):
        collator([*good, {"input_ids": [2, 3], "labels": 2}])
    with pytest.raises(ValueError, match="input_ids hold 98"):
        collator([*good, {"input_ids": [2, 98], "labels": 1}])
    with pytest.raises(ValueError, match="a row has 513 tokens"):
        collator([*good, {"input_ids": [2] * 513, "labels": 1}])


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_examples_refuse_more_tokens_than_positions(head, tmp_path):
    from examples.training import ModelArguments, load_model

    sparse(head).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"rows have 1024 tokens and .* has 512 positions; ask for rows of 512"):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
        load_model(AutoModelForCausalLM, "decoder", ModelArguments(str(tmp_path)), arguments)


def test_a_batch_that_processes_cannot_share_is_told():
    loader = torch.utils.data.DataLoader(range(6), batch_size=3)
    with pytest.raises(
        ValueError, match=r"batch size \(3\) needs to be a round multiple of the number of processes \(2\)"
    ):
        prepare_data_loader(loader, num_processes=2, process_index=0, split_batches=True)


# --- tensor parallelism

REFUSED = {
    "key heads": (
        2,
        "self_attn.k_proj has 3 heads, which 2 ranks cannot share evenly; choose a tp_size that divides 3",
    ),
    "directions": (2, "draws directions for each of 4 heads, and this rank has 2"),
    "ranks": (3, "world_size"),
}


def _refused(rank: int, folder: str) -> None:
    transformers.logging.set_verbosity_error()
    found = {}
    for name, (size, _) in REFUSED.items():
        try:
            config = DistributedConfig(tp_size=size)
            AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=config)(input_ids=IDS)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            found[name] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def test_ranks_that_cannot_share_heads_are_told(tmp_path):
    heads = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    for name, pattern in (("key heads", "window(5, 0)"), ("directions", "lsh(4)"), ("ranks", "window(5, 0)")):
        model = dense_model("LlamaForCausalLM", vocab_size=98, **(heads if name == "key heads" else {}))
        sparse_hf.sparsify(model, pattern).save_pretrained(tmp_path / name)
    run_distributed(2)(_refused)(str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, (_, message) in REFUSED.items():
            assert message in found[name], (rank, name)


def test_heads_that_nobody_says_the_place_of_are_told():
    pattern = "per_head(first(1), first(2), first(3), first(4))"
    assert own_heads(pattern, torch.nn.Linear(2, 2), 4, 4) == pattern
    assert own_heads("first(2)", torch.nn.Linear(2, 2), 2, 4) == "first(2)"
    with pytest.raises(ValueError, match="computes 2 heads of 4, and its projections are no DTensors"):
        own_heads(pattern, torch.nn.Linear(2, 2), 2, 4)


# --- accidents in one of two processes


def launch(accident: str, folder: Path, resume: str = "from the start") -> tuple[int, str]:
    """Exit status, and what was said."""
    arguments = ("--nproc_per_node=2", broken_run.__file__, "Trainer", accident, str(folder), resume)
    return finished(*TORCHRUN, *arguments)


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{broken_run.STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def check_checkpoint(folder: Path, head: str) -> None:
    """The last one is whole: it loads, and an optimizer goes on from it."""
    saved = folder / f"checkpoint-{broken_run.SAVED}"
    assert [p.name for p in folder.glob("checkpoint-*")] == [saved.name]
    model = getattr(sparse_hf, f"Sparse{head}").from_pretrained(saved)
    assert all(p.isfinite().all() for p in model.parameters())
    state = torch.load(saved / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == sum(1 for _ in model.parameters())


MESSAGES = {
    "label of a masked model": "ValueError: labels hold 1000; those of SparseBertForMaskedLM are 0 to 96",
    "label of a causal model": "ValueError: labels hold 1000; those of SparseLlamaForCausalLM are 0 to 96",
    "label of a token": "ValueError: labels hold 1000; those of SparseBertForTokenClassification are 0 to 1",
    "label of a row": "ValueError: labels hold 1000; those of SparseBertForSequenceClassification are 0 to 1",
    "long row": "ValueError: a row has 600 tokens; sparse_bert has positions for 512",
    "killed": "Signal 9 (SIGKILL)",
}


@pytest.mark.parametrize(
    "accident", ["killed", *(pytest.param(a, marks=pytest.mark.slow) for a in MESSAGES if a != "killed")]
)
def test_an_accident_in_one_process_ends_all(accident, tmp_path):
    status, said = launch(accident, tmp_path)
    assert status != 0 and MESSAGES[accident] in said, said[-3000:]
    assert accident == "killed" or f"process 1 of 2 failed: {MESSAGES[accident]}" in said, said[-3000:]
    check_checkpoint(tmp_path, broken_run.HEADS[accident])


@pytest.mark.parametrize(
    "way", ["heal", *(pytest.param(way, marks=pytest.mark.slow) for way in broken_run.WAYS if way != "heal")]
)
def test_all_processes_raise_what_one_met_with(way, tmp_path):
    """Without a launcher that ends them."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1"}
    # the store is here, so that no port need be guessed
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [sys.executable, "-W", "ignore", broken_run.__file__, way, "label of a causal model", str(tmp_path), ""]
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=HANG_S)[1] for rank in ranks]
    head = "SparseLlamaForCausalLM"
    message = f"ValueError: labels hold 1000; those of {head} are 0 to "
    assert message in said[1]
    # where nothing wakes it up, it says the same and ends as by a launcher
    kind = "" if way == "asleep" else "RuntimeError: "
    assert f"{kind}process 1 of 2 failed: {message}" in said[0], said[0][-3000:]
    assert ranks[1].returncode and ranks[0].returncode and (ranks[0].returncode == -signal.SIGTERM) == (way == "asleep")


@pytest.mark.slow
def test_what_was_killed_goes_on(tmp_path):
    assert launch("killed", tmp_path / "killed")[0] != 0
    status, said = launch("nothing", tmp_path / "killed", "resume")
    assert status == 0, said[-3000:]
    assert launch("nothing", tmp_path / "whole")[0] == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
