"""A sparse model under libraries that are no part of the extra `dev`: each test needs one, and is left out without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

import sparse_hf
from tests.models.families import dense_model, has_two_stacks, sparse_class
from tests.models.test_ecosystem import FULL, LLAMA, sparse_model
from tests.models.test_pipeline import tokenizer

# of the libraries themselves
pytestmark = pytest.mark.filterwarnings("ignore")


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int) -> str:
    return " ".join(f"w{number}" for number in ids(1, length, seed)[0].tolist())


def words() -> PreTrainedTokenizerFast:
    made = tokenizer()
    made.model_max_length, made.bos_token, made.eos_token = 512, "w1", "w2"
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def saved(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return str(folder)


def beside_dense(head: str, tmp_path: Path, run: Callable[[str], object], **changes) -> list:
    """What a library makes of a dense folder, and of the sparse one with all pairs."""
    dense = dense_model(head, **changes)
    sparse = sparse_hf.sparsify(dense, FULL, **({"layers": {"decoder": FULL}} if has_two_stacks(head) else {}))
    return [run(saved(model, tmp_path / name)) for name, model in (("dense", dense), ("sparse", sparse))]


# --- TRL ---


def trainer_arguments(folder: Path) -> dict:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0, "report_to": [],
        "logging_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip


def test_trl_tunes_alike_padded_packed_and_without_padding(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = Dataset.from_list([{"text": text(length, length)} for length in (20, 33, 12, 41)])
    losses = []
    for how in ({"max_length": 64}, {"max_length": 64, "packing": True}, {"max_length": None, "padding_free": True}):
        arguments = trl.SFTConfig(**trainer_arguments(tmp_path), **how)
        trainer = trl.SFTTrainer(
            model=sparse_model(LLAMA, "window(7, 0) | first(2)"),
            args=arguments,
            train_dataset=rows,
            processing_class=words(),
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)


def preferences() -> Iterable[dict[str, str]]:
    return [{"prompt": text(10, i), "chosen": text(8, 20 + i), "rejected": text(9, 40 + i)} for i in range(4)]


def test_trl_prefers_as_the_dense_model(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    def prefer(model) -> dict[str, float]:
        arguments = trl.DPOConfig(**trainer_arguments(tmp_path / "out"))
        trainer = trl.DPOTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(preferences()), processing_class=words()
        )
        trainer.train()
        return {name: trainer.state.log_history[0][name] for name in ("loss", "logps/chosen", "logps/rejected")}

    dense, sparse = beside_dense(LLAMA, tmp_path, prefer)
    assert sparse == pytest.approx(dense, abs=1e-3)
    # the model to compare with is loaded by name, which one in memory does not have
    with pytest.raises(OSError, match="Repo id"):
        prefer(sparse_model(LLAMA))


# --- lm-eval ---


@pytest.mark.parametrize("head", [LLAMA, "BartForConditionalGeneration"])
def test_lm_eval_scores_as_the_dense_model(head, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def score(folder: str) -> list:
        model = HFLM(pretrained=folder, device="cpu", batch_size=3, dtype="float32")
        pairs = [(text(10 + 5 * i, i), " " + text(3 + i, 50 + i)) for i in range(4)]
        asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
        return [model.AUTO_MODEL_CLASS.__name__, *(round(value, 3) for value, _ in model.loglikelihood(asked))]

    dense, sparse = beside_dense(head, tmp_path, score)
    assert sparse == dense


# --- bitsandbytes, captum ---


@pytest.mark.parametrize("head", [LLAMA, "BertForMaskedLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_answers_as_the_dense_model(head, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    if not head.startswith("Bert"):
        # what its kernels on a CPU take
        sizes |= {"head_dim": 16, "num_key_value_heads": 4}

    def answer(folder: str) -> torch.Tensor:
        made = sparse_class(head) if folder.endswith("sparse") else getattr(transformers, head)
        with torch.no_grad():
            return made.from_pretrained(folder, quantization_config=config)(ids(2, 40)).logits

    dense, sparse = beside_dense(head, tmp_path, answer, **sizes)
    assert torch.equal(dense, sparse)


def test_captum_attributes_as_in_the_dense_model():
    captum = pytest.importorskip("captum.attr")
    dense = dense_model(LLAMA)
    found = []
    for model in (dense, sparse_model(LLAMA, FULL, dense)):
        gradients = captum.LayerIntegratedGradients(lambda x, m=model: m(x).logits[:, -1], model.model.embed_tokens)
        found.append(gradients.attribute(ids(1, 40), torch.full((1, 40), 3), target=5, n_steps=6))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# --- what is refused ---


def test_paged_names_of_attention_are_refused():
    with pytest.raises(ValueError, match="would ignore the sparse pattern"):
        sparse_model(LLAMA).set_attn_implementation("paged|sdpa")


def test_optimum_asks_for_the_task():
    tasks = pytest.importorskip("optimum.exporters.tasks")
    with pytest.raises(ValueError, match="provide the argument --task"):
        tasks.TasksManager.infer_task_from_model(sparse_model("BertForSequenceClassification"))
